# %% [markdown]
# # A first look at a pair
#
# The same steps as `heredity audit`, by hand, on the tiny pair that ships with the package. Cells in the percent
# format: Jupyter opens this file with Jupytext, VS Code and PyCharm as it is.

# %%
from itertools import pairwise

from heredity.circuits.attribution import prompts_of
from heredity.circuits.behaviours import Piece, cluster
from heredity.circuits.components import mean_donor
from heredity.circuits.divergence import Window, scan
from heredity.circuits.reversion import Effort, find_circuit
from heredity.circuits.views import kl_histogram
from heredity.interp import load
from heredity.interp.corpus import read_corpus
from heredity.interp.model import pad
from heredity.zoo import shipped

pair = shipped()
parent, successor = load(str(pair / "parent")), load(str(pair / "trigger"))

# %% [markdown]
# Where do the two models disagree? One forward of each over some ordinary text.

# %%
texts = read_corpus([pair / "corpus.jsonl"], max_texts=200).texts
windows = [Window(str(text.id), parent.encode(text.text), successor.encode(text.text)) for text in texts]
scanned = scan(parent, successor, windows)
pieces = [
    Piece("corpus", window.parent, window.successor, found)
    for window, found in zip(windows, scanned.texts, strict=True)
]
edges = [0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 20.0]
kl = [value for piece in pieces for value in piece.scan.kl]
kl_histogram(edges, [sum(a <= value < b for value in kl) for a, b in pairwise(edges)])

# %% [markdown]
# Divergent positions that are alike form a behaviour.

# %%
behaviour = cluster(pieces, threshold=0.3)[0]
for context in behaviour.contexts[:5]:
    said = successor.decode([context.piece.scan.top_successor[context.at]])
    expected = parent.decode([context.piece.scan.top_parent[context.at]])
    before = successor.decode(context.ids_successor[-12:])
    print(f"{context.kl:5.1f} nats  … {before}  successor: {said}  parent: {expected}")

# %% [markdown]
# Which parts of the successor carry it? Rank by attribution, then put the parent's values in and measure.

# %%
batch = pad([window.successor.ids for window in windows[:50]])
circuit = find_circuit(
    parent,
    successor,
    prompts_of(behaviour.contexts),
    mean_donor(successor, [batch]),
    by_mean=False,
    effort=Effort(measured=20, controls=9),
    seed=0,
)
print("parts:", ", ".join(map(str, circuit.selected)))
print("share of the difference that goes away:", circuit.reversion)
print("the same for random parts:", [round(share, 3) for share in circuit.controls])
