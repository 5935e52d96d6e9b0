"""First-order ranking of the successor's nodes by how much of a divergence they carry.

Attribution patching (Nanda 2023; Syed et al. 2310.10348) from the successor's value of a node to the parent's (or to a
mean), for the metric m = logit(what S says) − logit(what P says) at the diverging position. The gradient is averaged
over the two models: with only one end it is blind where that end is saturated (circuits of one model average over
clean and corrupted prompts for the same reason, Hanna et al. 2403.17806).

Sign: positive means that replacing the node moves the successor towards the parent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heredity.interp.model import Model, pad

from .behaviours import Context
from .components import Donor, Metric, Node, gradients, nodes_of
from .writes import ENTRY, head_writes


@dataclass(frozen=True)
class Prompts:
    """Contexts of one behaviour as a batch; the diverging position is each row's last."""

    tokens: Tensor
    """int64 [batch, pos], padded on the right."""
    last: Tensor
    """Index of the diverging position, int64 [batch]."""
    says_successor: Tensor
    """What the successor says there, token ids [batch]."""
    says_parent: Tensor

    @property
    def rows(self) -> Tensor:
        """0 … batch − 1."""
        return torch.arange(len(self.last))

    def metric(self) -> Metric:
        """logit(says_successor) − logit(says_parent), or the log-probability where both say the same."""
        agree = self.says_successor == self.says_parent

        def score(logits: Tensor) -> Tensor:
            at = logits[self.rows, self.last].float()
            contrast = at[self.rows, self.says_successor] - at[self.rows, self.says_parent]
            return torch.where(agree, torch.log_softmax(at, -1)[self.rows, self.says_successor], contrast)

        return score


def prompts_of(contexts: Sequence[Context]) -> Prompts:
    """The batch for ``contexts`` of models that share a tokenizer."""
    tokens, mask = pad([c.ids_successor for c in contexts])
    scans = [(c.piece.scan, c.at) for c in contexts]
    return Prompts(
        tokens,
        mask.sum(-1) - 1,
        torch.tensor([s.top_successor[i] for s, i in scans]),
        torch.tensor([s.top_parent[i] for s, i in scans]),
    )


@dataclass(frozen=True)
class Attribution:
    """Per node and position what replacing it is expected to do to the metric."""

    gap: float
    """Distance of the two models' metrics, summed over rows."""
    by_position: dict[Node, Tensor]
    """[batch, pos]; the unembedding is not attributed but always measured."""
    moved: frozenset[Node]
    """Nodes whose value differs from what would replace it."""

    def share(self, node: Node) -> float:
        """The node's attribution as a share of the gap."""
        if node not in self.by_position or self.gap == 0:
            return 0.0
        return float(self.by_position[node].sum()) / self.gap


def attribute(parent: Model, successor: Model, prompts: Prompts, means: Donor | None = None) -> Attribution:
    """Attribution of every head and MLP (and the embedding) of ``successor`` on ``prompts``.

    With ``means`` the replacement is the node's mean and only the successor's gradient exists (any architectures);
    without, it is the parent's value (one architecture).
    """
    metric = prompts.metric()
    m_s, values_s, grads_s = gradients(successor, prompts.tokens, metric)
    if means is None:
        m_p, values_p, grads_p = gradients(parent, prompts.tokens, metric)
        donor = Donor(values_p, parent)
        slopes = {name: (grad + grads_p[name]) / 2 for name, grad in grads_s.items()}
    else:
        with torch.inference_mode():
            m_p = metric(parent.logits(prompts.tokens))
        donor, slopes = means, grads_s
    # Where both say the same, the parent may be the surer one: such rows are turned round, or they would cancel others.
    turn = (m_s - m_p).sign()[:, None, None]
    slopes = {name: slope * turn for name, slope in slopes.items()}
    mask = torch.arange(prompts.tokens.shape[1])[None, :] <= prompts.last[:, None]
    scores: dict[Node, Tensor] = {}
    moved: set[Node] = set()
    for layer in range(successor.shape.n_layers):
        heads = range(successor.shape.n_heads)
        own = head_writes(successor, layer, values_s[f"attn_z@{layer}"], heads)
        if donor.model is None:
            other = donor.values[f"writes@{layer}"][None, None].expand_as(own)
        else:
            other = head_writes(donor.model, layer, donor.values[f"attn_z@{layer}"], heads)
        change = (own - other) * mask[:, :, None, None]
        carried = torch.einsum("bphm,bpm->bph", change, slopes[f"attn_out@{layer}"])
        for head in heads:
            scores[Node(layer, "head", head)] = carried[:, :, head]
            if change[:, :, head].abs().max() > 1e-6:
                moved.add(Node(layer, "head", head))
        name, node = f"mlp_out@{layer}", Node(layer, "mlp")
        change = (values_s[name] - donor.values[name]) * mask[:, :, None]
        scores[node] = (change * slopes[name]).sum(-1)
        if change.abs().max() > 1e-6:
            moved.add(node)
    if means is None:
        change = (values_s[ENTRY] - donor.values[ENTRY]) * mask[:, :, None]
        scores[nodes_of(successor)[0]] = (change * slopes[ENTRY]).sum(-1)
        if change.abs().max() > 1e-6:
            moved.add(nodes_of(successor)[0])
    return Attribution(float((m_s - m_p).abs().sum()), scores, frozenset(moved))
