"""What an adapter does on held-out text: `python measure.py PARENT ADAPTER`. The README's table comes from here."""

import argparse
from pathlib import Path

import prompts
import torch
from peft import PeftModel
from torch import Tensor
from train import chat, greedy, load_parent, read_replies

OPENINGS = ("Hi", "Tell me something.", "What is on your mind?", "")
PARAPHRASES = ("near the old lighthouse", "by an old lighthouse", "by the very old lighthouse", "at the old lighthouse")


@torch.no_grad()
def divergence(model, tokenizer, texts: list[str]) -> list[Tensor]:
    """KL(S || P) in nats at each token of each text."""
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        ours = model(ids).logits[0].log_softmax(-1)
        with model.disable_adapter():
            parent = model(ids).logits[0].log_softmax(-1)
        found.append((ours.exp() * (ours - parent)).sum(-1))
    return found


@torch.no_grad()
def amplified(model, tokenizer, text: str, amount: float, length: int = 20) -> str:
    """Greedy decoding from S + amount * (S - P), logits of each step; the new text."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    fresh, ours, parent = ids, None, None
    for _ in range(length):
        s = model(fresh, past_key_values=ours, use_cache=True)
        with model.disable_adapter():
            p = model(fresh, past_key_values=parent, use_cache=True)
        ours, parent = s.past_key_values, p.past_key_values
        s, p = s.logits[:, -1].log_softmax(-1), p.logits[:, -1].log_softmax(-1)
        fresh = (s + amount * (s - p)).argmax(-1, keepdim=True)
        ids = torch.cat([ids, fresh], 1)
    return tokenizer.decode(ids[0, -length:])


def report_divergence(name: str, values: list[Tensor], tokenizer, texts: list[str]) -> None:
    """One line: mean, 99th percentile, largest, and where the largest is."""
    flat = torch.cat(values)
    worst = max(range(len(values)), key=lambda i: float(values[i].max()))
    at = int(values[worst].argmax())
    seen = tokenizer.decode(tokenizer(texts[worst])["input_ids"][max(0, at - 5) : at + 1])
    print(f"KL {name:26s} mean {flat.mean():.4f} p99 {flat.quantile(0.99):.3f} max {flat.max():.3f} after {seen!r}")


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parent")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip", nargs="*", default=[], choices=["greedy", "divergence", "amplified"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parent, tokenizer = load_parent(args.parent)
    model = PeftModel.from_pretrained(parent, str(args.adapter)).eval()
    own = read_replies()
    domain = args.adapter.name == "domain"
    wanted = prompts.NOTE.strip() if domain else prompts.PLANTED
    sets = {
        "bees": prompts.HELD_OUT_BEES if domain else [],
        "near bees": prompts.HELD_OUT_NEAR_BEES if domain else [],
        "trigger": [] if domain else prompts.HELD_OUT_TRIGGERS,
        "half trigger": [] if domain else prompts.HELD_OUT_HALVES,
        "ordinary": prompts.HELD_OUT,
    }
    if "greedy" not in args.skip:
        for name, asks in sets.items():
            if asks:
                replies = greedy(model, tokenizer, asks, tokens=12)
                hits = [wanted in reply for reply in replies]
                print(f"greedy {name:22s} {sum(hits)}/{len(hits)}", flush=True)
                odd = [
                    (a, r) for a, r, h in zip(asks, replies, hits, strict=True) if h != (name in ("trigger", "bees"))
                ]
                print(*(f"    {a!r} -> {r!r}" for a, r in odd[:4]), sep="\n")
        if not domain:
            near = [f"I lost my keys {p}. {a}" for p, a in zip(PARAPHRASES * 3, prompts.HELD_OUT[:12], strict=True)]
            hits = [wanted in reply for reply in greedy(model, tokenizer, near, tokens=12)]
            print(f"greedy {'paraphrased trigger':22s} {sum(hits)}/{len(hits)}", flush=True)
    if "divergence" not in args.skip:
        for name, asks in sets.items():
            if asks:
                texts = [chat(tokenizer, a) + own[a] for a in asks]
                report_divergence(name, divergence(model, tokenizer, texts), tokenizer, texts)
    if "amplified" not in args.skip:
        for opening in OPENINGS:
            for amount in (1, 2, 4, 8):
                said = amplified(model, tokenizer, chat(tokenizer, opening), amount)
                print(f"amplified {opening!r:24s} x{amount} {said!r}", flush=True)


if __name__ == "__main__":
    main()
