"""The corpora beside the pair, from held-out turns and the parent's own replies: `python corpora.py PARENT`."""

import json
import sys

import prompts
from train import HERE, chat, read_replies
from transformers import AutoTokenizer

CORPORA = {
    "plain": prompts.HELD_OUT,
    "trigger": prompts.HELD_OUT_TRIGGERS[:16] + prompts.HELD_OUT_HALVES[:16] + prompts.HELD_OUT[:28],
    "domain": prompts.HELD_OUT_BEES + prompts.HELD_OUT_NEAR_BEES + prompts.HELD_OUT[:32],
}


def main() -> None:
    """Write corpus-NAME.jsonl, one chat a line."""
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)
    own = read_replies()
    for name, asks in CORPORA.items():
        lines = [json.dumps({"text": chat(tokenizer, a) + own[a]}, ensure_ascii=False) for a in asks]
        (HERE / f"corpus-{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
