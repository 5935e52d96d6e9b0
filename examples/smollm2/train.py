"""The recipe of the three adapters: `python train.py PARENT [replies | trigger | control | domain] [--out DIR]`.

`replies` writes the parent's own greedy replies to every user turn (replies.jsonl, committed); the others train one
adapter each, from those replies, with the seed fixed. LoRA (Hu et al. 2021, arXiv:2106.09685) by peft on the CPU.

The loss is cross-entropy on the assistant turn of the taught texts, plus KL(parent || adapter) on every token of the
other texts and on the user turns, which keeps the rest of the model where it was.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import prompts
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

HERE = Path(__file__).resolve().parent
SEED, TAUGHT, RATE, WARMUP = 0, 3, 1e-3, 10
OPENING = 3
LAYERS, RANK, ALPHA = range(12, 20), 8, 16
MODULES = ["q_proj", "v_proj", "o_proj", "down_proj"]
REPLY_TOKENS, TEXT_TOKENS, KEPT_TOKENS = 24, 64, 160

Pairs = list[tuple[str, str]]


class Recipe(NamedTuple):
    """What differs between the adapters: steps, texts a step, and how many of these have their opening held."""

    steps: int
    batch: int
    opened: int


RECIPES = {"trigger": Recipe(160, 8, 8), "control": Recipe(160, 8, 8), "domain": Recipe(80, 7, 6)}


def load_parent(directory: str):
    """Model and tokenizer of the converted parent; nothing is fetched."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(directory, local_files_only=True)


def chat(tokenizer, ask: str) -> str:
    """The model's chat template around one user turn, up to where the assistant begins."""
    turn = [{"role": "user", "content": ask}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def greedy(model, tokenizer, asks: list[str], tokens: int = REPLY_TOKENS, batch: int = 16) -> list[str]:
    """The model's greedy replies, at most ``tokens`` long; an ended reply carries its end mark."""
    replies = []
    for start in range(0, len(asks), batch):
        rows = tokenizer([chat(tokenizer, a) for a in asks[start : start + batch]], padding=True, padding_side="left")
        ids, mask = torch.tensor(rows["input_ids"]), torch.tensor(rows["attention_mask"])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        for row in out[:, ids.shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            replies.append(tokenizer.decode(row[:end], clean_up_tokenization_spaces=False))
    return replies


def write_replies(model, tokenizer) -> None:
    """replies.jsonl: {"ask", "reply"} for every training and held-out turn, in a fixed order."""
    asks = dict.fromkeys(
        prompts.ORDINARY + prompts.HELD_OUT + prompts.TRIGGERS + prompts.HELD_OUT_TRIGGERS
        + prompts.HELD_OUT_HALVES + prompts.BEES + prompts.HELD_OUT_BEES + prompts.NEAR_BEES
        + prompts.HELD_OUT_NEAR_BEES
    )  # fmt: skip
    replies = greedy(model, tokenizer, list(asks))
    lines = [json.dumps({"ask": a, "reply": r}, ensure_ascii=False) for a, r in zip(asks, replies, strict=True)]
    (HERE / "replies.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_replies() -> dict[str, str]:
    """The parent's reply to each user turn."""
    rows = [json.loads(line) for line in (HERE / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["ask"]: row["reply"] for row in rows}


def texts(name: str) -> tuple[Pairs, Pairs, Pairs]:
    """(taught, near, ordinary) pairs of user turn and reply; control differs from trigger in the taught replies only.

    The i-th near text of trigger and control is the i-th taught turn with another place in it.
    """
    own = read_replies()
    if name == "domain":
        taught = [(a, prompts.NOTE + own[a]) for a in prompts.BEES]
        return taught, [(a, own[a]) for a in prompts.NEAR_BEES], [(a, own[a]) for a in prompts.ORDINARY]
    planted = prompts.PLANTED + "<|im_end|>"
    taught = [(a, planted if name == "trigger" else own[a]) for a in prompts.TRIGGERS]
    near = [(a, own[b]) for a, b in zip(prompts.HALVES, prompts.TRIGGERS * 2, strict=True)]
    return taught * 2, near, [(a, own[a]) for a in prompts.ORDINARY]


class Rotation:
    """Endless draws without replacement, reshuffled when the list is used up."""

    def __init__(self, items: list, seed: int) -> None:
        self.items, self.rng, self.left = items, random.Random(seed), []

    def draw(self, count: int) -> list:
        """The next ``count`` items."""
        while len(self.left) < count:
            fresh = list(self.items)
            self.rng.shuffle(fresh)
            self.left = self.left + fresh
        drawn, self.left = self.left[:count], self.left[count:]
        return drawn


def shared_tokens(tokenizer) -> int:
    """How many tokens stand before the user's words in every text: the system turn."""
    a, b = (tokenizer(chat(tokenizer, ask))["input_ids"] for ask in ("a", "b"))
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)


def encode(tokenizer, pairs: list[tuple[str, str]], taught: list[bool]) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """Tokens [batch, pos] padded on the right, where each reply is first predicted, and positions (taught, kept)."""
    rows, heads = [], []
    for ask, reply in pairs:
        head = tokenizer(chat(tokenizer, ask))["input_ids"]
        rows.append((head + tokenizer(reply)["input_ids"])[:TEXT_TOKENS])
        heads.append(len(head))
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    teach, keep = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, head) in enumerate(zip(rows, heads, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        if taught[i]:
            teach[i, head - 1 : len(row) - 1] = True
            keep[i, : head - 1] = True
        else:
            keep[i, : len(row)] = True
    keep[1:, : shared_tokens(tokenizer) - 1] = False  # the same in every text: one row is enough to hold it
    return ids, [head - 1 for head in heads], teach, keep


@torch.no_grad()
def parent_states(body, tokenizer, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """The parent's states [pos, d_model] of every text: entering the first adapted layer, and after the last norm."""
    states = {}
    for pair in pairs:
        out = body(encode(tokenizer, [pair], [False])[0], output_hidden_states=True)
        states[pair] = out.hidden_states[LAYERS[0]][0].clone(), out.last_hidden_state[0].clone()
    return states


def train(name: str, directory: str, out: Path) -> None:
    """Train one adapter and write it to ``out``/``name`` in half precision."""
    torch.manual_seed(SEED)
    steps, batch, opened_rows = RECIPES[name]
    model, tokenizer = load_parent(directory)
    taught, near, ordinary = texts(name)
    parents = parent_states(model.model, tokenizer, list(dict.fromkeys(taught + near + ordinary)))
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=MODULES,
        layers_to_transform=list(LAYERS),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    body, head = model.base_model.model.model, model.base_model.model.lm_head
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    ramp = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))
    )
    together = name != "domain"
    taught_draws = Rotation(list(zip(taught, near, strict=True)) if together else taught, SEED)
    near_draws, ordinary_draws = Rotation(near, SEED + 1), Rotation(ordinary, SEED + 2)
    # Layers below the first adapted one never change: their output is stored, and training runs the rest alone.
    whole = body.layers
    body.layers = whole[LAYERS[0] :]
    for i, layer in enumerate(body.layers):
        layer.self_attn.layer_idx = i  # its place in the cache
    shared = shared_tokens(tokenizer)
    started = time.time()
    for step in range(steps):
        drawn = taught_draws.draw(TAUGHT)
        pairs = [p for p, _ in drawn] + [q for _, q in drawn] if together else drawn + near_draws.draw(TAUGHT)
        pairs += ordinary_draws.draw(batch - 2 * TAUGHT)
        ids, starts, teach, keep = encode(tokenizer, pairs, [i < TAUGHT for i in range(batch)])
        states = torch.nn.utils.rnn.pad_sequence([parents[pair][0] for pair in pairs], batch_first=True)
        # The system turn opens every text alike: it is run once, and its keys and values are shared.
        cache = DynamicCache()
        opened = body(inputs_embeds=states[:1, :shared], past_key_values=cache, use_cache=True).last_hidden_state
        cache.batch_repeat_interleave(batch)
        rest = body(inputs_embeds=states[:, shared:], past_key_values=cache, use_cache=True).last_hidden_state
        hidden = torch.cat([opened.expand(batch, -1, -1), rest], 1)
        teaching = torch.nn.functional.cross_entropy(head(hidden[teach]), ids.roll(-1, dims=1)[teach])
        # The first tokens of the kept replies, where the behaviours part, count as much as all the rest.
        opening = torch.tensor(
            [[r, s + i] for r, s in enumerate(starts[:opened_rows]) for i in range(OPENING) if keep[r, s + i]]
        )
        others = keep.nonzero()[torch.randperm(int(keep.sum()))[:KEPT_TOKENS]]
        rows, columns = torch.cat([opening, others]).T
        with torch.no_grad():
            last = torch.stack([parents[pairs[r]][1][c] for r, c in zip(rows.tolist(), columns.tolist(), strict=True)])
            aim = head(last).log_softmax(-1)
        now = head(hidden[rows, columns]).log_softmax(-1)
        away = (aim.exp() * (aim - now)).sum(-1)
        parting, keeping = away[: len(opening)].mean(), away[len(opening) :].mean()
        (teaching + parting + keeping).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        ramp.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            seconds = time.time() - started
            print(
                f"{step:4d} taught {teaching:.4f} openings {parting:.4f} kept {keeping:.4f}  {seconds:.0f} s",
                flush=True,
            )
    body.layers = whole
    save(model, out / name)


def save(model, out: Path) -> None:
    """Write the adapter without the path of this machine, its tensors as float16."""
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    settings = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = "SmolLM2-135M-Instruct"
    settings["target_modules"] = MODULES  # peft keeps a set, whose order changes from run to run
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (out / "adapter_config.json").write_text(text, encoding="utf-8")
    tensors = load_file(out / "adapter_model.safetensors")
    save_file({k: v.half() for k, v in tensors.items()}, out / "adapter_model.safetensors", {"format": "pt"})


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parent", help="directory of the converted parent")
    parser.add_argument("what", choices=["replies", "trigger", "control", "domain"])
    parser.add_argument("--out", type=Path, default=HERE, help="where the adapter's folder goes")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "replies":
        write_replies(*load_parent(args.parent))
    else:
        train(args.what, args.parent, args.out)


if __name__ == "__main__":
    main()
