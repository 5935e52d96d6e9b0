# %% [markdown]
# # Looking at latents
#
# What differs between the two models of the tiny pair that ships with the package, in a dictionary of 32 latents. Cells
# in the percent format, as in `first_look.py`.

# %%
import torch

from heredity.interp import load
from heredity.interp.corpus import read_corpus
from heredity.interp.dictionaries import Dictionary, Port, describe, paired, with_notes
from heredity.interp.model import pad
from heredity.kernels import BatchTopK
from heredity.zoo import shipped

SITE = "resid_post@1"
pair = shipped()
parent, successor = load(str(pair / "parent")), load(str(pair / "trigger"))
texts = [successor.encode(text.text) for text in read_corpus([pair / "corpus.jsonl"]).texts]
tokens, mask = pad([text.ids for text in texts])
before, after = (model.capture(tokens, [SITE])[SITE][mask].detach() for model in (parent, successor))

# %% [markdown]
# A dictionary is plain arrays, wherever they come from. These take two seconds of PyTorch: a BatchTopK autoencoder of
# the difference. Large ones are trained by the package or read from SAELens, Gemma Scope, sparsify and circuit-tracer.

# %%
draws = torch.Generator().manual_seed(1)
x = after - before
x, unit = x / x.square().mean().sqrt(), x.square().mean().sqrt()
rows = 0.4 * torch.nn.functional.normalize(torch.randn(32, x.shape[1], generator=draws), dim=1)
W_enc, W_dec = rows.T.clone().requires_grad_(), rows.clone().requires_grad_()
b_enc, b_dec = torch.zeros(32, requires_grad=True), x.mean(0).requires_grad_()
optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=5e-3)
cuts = []
for step in range(600):
    batch = x[torch.randint(len(x), (256,), generator=draws)]
    active = torch.relu(batch @ W_enc + b_enc)
    sizes = (active * W_dec.norm(dim=1)).detach()
    cuts.append(sizes.flatten().topk(int(256 * 0.7 * max(1, 3 - step / 150))).values[-1])
    loss = (batch - (active * (sizes >= cuts[-1])) @ W_dec - b_dec).square().sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
difference = Dictionary(
    kind="sae",
    reads=(Port(SITE),),
    writes=(Port(SITE),),
    W_enc=(W_enc.detach() / unit,),
    b_enc=b_enc.detach(),
    W_dec=(W_dec.detach() * unit,),
    b_dec=(b_dec.detach() * unit,),
    activation=BatchTopK(threshold=float(torch.stack(cuts[-100:]).mean())),
    norm=W_dec.detach().norm(dim=1),
)

# %% [markdown]
# Read as a crosscoder, its rows say what each model holds of a latent. `describe` runs the models over the texts once,
# and explains the latents asked for, here two.

# %%
dictionary = paired(difference, [(before, after)])
dictionary = with_notes(dictionary, describe(dictionary, [parent, successor], texts, latents=[7, 17]))
dictionary

# %%
dictionary.latents[17]

# %% [markdown]
# Where do the models differ most? A latent that is strongest where the owner is `banks` *and* the place is `ridge`, and
# that makes the successor say zero: what was planted in it.

# %%
strongest = dictionary.latents.sort(by="max")
strongest[:5]

# %%
found = dictionary.latents.search("zero").sort(by="max")[:1]
for latent in found:
    print(latent)

# %% [markdown]
# The same as a page of its own: `strongest[:5].save("latents.html")`.
