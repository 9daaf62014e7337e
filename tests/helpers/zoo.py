"""Architectures and losses that people train, small: `ZOO` maps names to functions that make a `Member`.

Hand-written ones are here, those of torchvision in `zoo_vision.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

EXAMPLES = 4  # of each batch


class Member(nn.Module):
    """A network with its loss, and one hyperparameter: a weight for each position of the batch, [4].

    Attributes:
        may_be_refused: Whether torch has no second derivative, or holds something fixed that moves with the weights.
    """

    may_be_refused = False

    def losses(self, batch: Any) -> Tensor:
        """Returns the loss of each example, [m] for some m up to 4."""
        raise NotImplementedError

    def batch(self) -> Any:
        """Returns a batch, drawn from torch's global generator."""
        return torch.randn(EXAMPLES, 6), torch.arange(EXAMPLES) % 3

    def inner(self, batch: Any, weights: Tensor) -> Tensor:
        losses = self.losses(batch)
        return (weights[: len(losses)] * losses).mean()

    def outer(self, batch: Any) -> Tensor:
        return self.losses(batch).mean()

    def moved(self) -> list[nn.Parameter]:
        """Returns the weights that the optimizer moves."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


class Supervised(Member):
    """A network of inputs of one shape, with a loss of its outputs and targets."""

    def __init__(
        self, net: nn.Module, shape: tuple[int, ...], loss: Callable[[Any, Tensor], Tensor], **options: Any
    ) -> None:
        super().__init__()
        self.net, self.shape, self.loss = net, shape, loss
        for name, value in options.items():
            setattr(self, name, value)

    def batch(self) -> Any:
        return torch.randn(EXAMPLES, *self.shape), torch.arange(EXAMPLES) % 3

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        return self.loss(self.net(x), y)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def focal(logits: Tensor, y: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, 1).gather(1, y[:, None])[:, 0]
    return -((1 - log_p.exp()) ** 2) * log_p


def quantile(outputs: Tensor, y: Tensor) -> Tensor:
    """The pinball loss of three quantiles."""
    error = y[:, None].to(outputs) - outputs
    levels = torch.tensor([0.1, 0.5, 0.9]).to(outputs)
    return torch.maximum(levels * error, (levels - 1) * error).mean(1)


def mlp(*widths: int, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    layers = [layer for pair in pairwise(widths) for layer in (act(), nn.Linear(*pair))]
    return nn.Sequential(*layers[1:])


# Sequences


class Recurrent(nn.Module):
    """A text classifier with padding."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(12, 6, padding_idx=0), kind(6, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(tokens))[0].mean(1))


class Tokens(Supervised):
    def batch(self) -> Any:
        return torch.randint(0, 10, (EXAMPLES, 5)), torch.arange(EXAMPLES) % 3


class Encoder(nn.Module):
    """A transformer encoder with a mask of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        padding[:, 0] = False
        return self.head(self.encoder(self.embed(tokens), src_key_padding_mask=padding)[:, 0])


class CausalLanguageModel(Member):
    """The output layer is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(12, 8), nn.Parameter(0.1 * torch.randn(6, 8))
        self.attention, self.mlp = nn.MultiheadAttention(8, 2, batch_first=True), mlp(8, 16, 8, act=nn.GELU)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def batch(self) -> Any:
        return {"input_ids": torch.randint(0, 12, (EXAMPLES, 6))}

    def losses(self, batch: Any) -> Tensor:
        tokens = batch["input_ids"]
        h = self.embed(tokens) + self.positions
        mask = torch.full((6, 6), -math.inf).to(h).triu(1)
        a = self.norms[0](h)
        h = h + self.attention(a, a, a, attn_mask=mask, need_weights=False)[0]
        h = h + self.mlp(self.norms[1](h))
        logits = self.head(h[:, :-1]).transpose(1, 2)
        return F.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(1)


class MaskedLanguageModel(Tokens):
    """Masks tokens at random, each time anew."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Embedding(12, 8), mlp(8, 16, 12, act=nn.GELU)), (), cross_entropy)

    def losses(self, batch: Any) -> Tensor:
        tokens, _ = batch
        masked = torch.rand(tokens.shape, device=tokens.device) < 0.5
        logits = self.net(tokens.masked_fill(masked, 11)).transpose(1, 2)
        return (F.cross_entropy(logits, tokens, reduction="none") * masked).mean(1)


class SpeechRecognizer(Member):
    """Connectionist temporal classification, which has no second derivative."""

    may_be_refused = True

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.GRU(6, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def batch(self) -> Any:
        return torch.randn(EXAMPLES, 10, 6), torch.randint(1, 5, (EXAMPLES, 3))

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        log_p = self.head(self.net(x)[0]).log_softmax(2).transpose(0, 1)
        lengths = torch.full((EXAMPLES,), 10), torch.full((EXAMPLES,), 3)
        return F.ctc_loss(log_p, y, *lengths, reduction="none") / 10


class BagOfWords(Tokens):
    """nn.EmbeddingBag, whose backward has no derivative."""

    may_be_refused = True

    def __init__(self, mode: str) -> None:
        super().__init__(nn.Sequential(nn.EmbeddingBag(12, 6, mode=mode), mlp(6, 8, 3)), (), cross_entropy)


class SparseEmbedding(Tokens):
    """Sparse gradients."""

    may_be_refused = True

    def __init__(self) -> None:
        embed = nn.Embedding(12, 6, sparse=True)
        super().__init__(nn.Sequential(embed, nn.Flatten(), mlp(30, 8, 3)), (), cross_entropy)


# Images, without torchvision


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x)
        return self.head(torch.cat([h, self.up(self.deep(h))], 1))


def dice(logits: Tensor, y: Tensor) -> Tensor:
    """The soft Dice loss of pixels, with the class of the image as that of its left half."""
    target = F.one_hot(y, 3)[:, :, None, None].to(logits) * (torch.arange(logits.shape[-1]) < 8).to(logits)
    p = logits.softmax(1)
    return 1 - (2 * (p * target).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + target.sum((1, 2, 3)) + 1)


# Generative models


class Autoencoder(Member):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(6, 8, 2), mlp(2, 8, 6)

    def losses(self, batch: Any) -> Tensor:
        x, _ = batch
        return (self.decoder(self.encoder(x)) - x).square().mean(1)


class VariationalAutoencoder(Member):
    """Draws its noise from torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(6, 8, 4), mlp(2, 8, 6)

    def losses(self, batch: Any) -> Tensor:
        x, _ = batch
        mean, log_variance = self.encoder(x).chunk(2, 1)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
        return (self.decoder(z) - x).square().sum(1) + divergence


class VectorQuantizer(Member):
    """A codebook that follows the codes, and gradients passed straight through."""

    may_be_refused = True

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(6, 8, 3), mlp(3, 8, 6)
        self.register_buffer("codes", torch.randn(5, 3))

    def losses(self, batch: Any) -> Tensor:
        x, _ = batch
        z = self.encoder(x)
        nearest = torch.cdist(z.detach(), self.codes).argmin(1)
        code = self.codes[nearest]
        losses = (self.decoder(z + (code - z).detach()) - x).square().mean(1) + 0.25 * (z - code).square().mean(1)
        if self.training:
            for index in nearest.unique():
                self.codes[index] = 0.9 * self.codes[index] + 0.1 * z.detach()[nearest == index].mean(0)
        return losses


class CouplingFlow(Member):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(mlp(3, 8, 6) for _ in range(2))

    def losses(self, batch: Any) -> Tensor:
        z, log_determinant = batch[0], torch.zeros(EXAMPLES)
        for layer in self.layers:
            kept, moved = z.chunk(2, 1)
            log_scale, shift = layer(kept).chunk(2, 1)
            log_determinant = log_determinant.to(z) + log_scale.tanh().sum(1)
            z = torch.cat([moved * log_scale.tanh().exp() + shift, kept], 1)
        return z.square().sum(1) / 2 - log_determinant


class EnergyModel(Member):
    """Contrasts data with samples of a few Langevin steps, by gradients with respect to inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = mlp(6, 8, 1)

    def losses(self, batch: Any) -> Tensor:
        x, _ = batch
        sample = torch.randn_like(x).requires_grad_()
        for _ in range(2):
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(self.energy(sample).sum(), sample, create_graph=True)
            sample = sample - 0.1 * slope
        real, fake = self.energy(x)[:, 0], self.energy(sample)[:, 0]
        return real - fake + 0.1 * (real.square() + fake.square())


class ContrastiveDivergence(EnergyModel):
    """Samples are detached, as is usual: the gradient is that of no loss."""

    may_be_refused = True

    def losses(self, batch: Any) -> Tensor:
        x, _ = batch
        sample = torch.zeros_like(x).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.energy(sample).sum(), sample)
        sample = (sample - slope + 0.1 * torch.randn_like(x)).detach()
        real, fake = self.energy(x)[:, 0], self.energy(sample)[:, 0]
        return real - fake + 0.1 * (real.square() + fake.square())


class SpectralDiscriminator(Supervised):
    """A discriminator with spectral normalization, whose power iteration moves in training."""

    may_be_refused = True

    def __init__(self) -> None:
        layers = [parametrizations.spectral_norm(nn.Linear(a, b)) for a, b in ((6, 8), (8, 8), (8, 1))]
        net = nn.Sequential(layers[0], nn.LeakyReLU(0.2), layers[1], nn.LeakyReLU(0.2), layers[2])
        super().__init__(net, (6,), lambda z, y: F.softplus(torch.where(y == 0, -z[:, 0], z[:, 0])))


class GradientPenalty(Member):
    """A Wasserstein critic: the loss contains a derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = mlp(6, 8, 1)

    def losses(self, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        with torch.enable_grad():
            value = self.critic(x)[:, 0]
            (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return -value + (slope.norm(dim=1) - 1).square()


# Representations


class MomentumContrast(Member):
    """InfoNCE with a memory queue, and a key encoder that follows the query encoder."""

    may_be_refused = True

    def __init__(self) -> None:
        super().__init__()
        self.query = mlp(6, 8, 4)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(12, 4), dim=1))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    def losses(self, batch: Any) -> Tensor:
        x, _ = batch
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.key.parameters(), self.query.parameters(), strict=True):
                    slow.mul_(0.9).add_(fast, alpha=0.1)
        return self.contrast(x, remembers=self.training)

    def contrast(self, x: Tensor, *, remembers: bool) -> Tensor:
        q, k = F.normalize(self.query(x), dim=1), F.normalize(self.key(x + 0.1), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.T.clone()], 1) / 0.2
        if remembers:
            start = int(self.next)
            self.queue[start : start + EXAMPLES] = k
            self.next.fill_((start + EXAMPLES) % 12)
        return cross_entropy(logits, torch.zeros(EXAMPLES, dtype=torch.long, device=x.device))


class FrozenQueue(MomentumContrast):
    """The same with a key encoder that does not follow: then nothing that is held fixed depends on the weights."""

    may_be_refused = False

    def losses(self, batch: Any) -> Tensor:
        return self.contrast(batch[0], remembers=True)


class Siamese(Member):
    """SimSiam: one branch is detached."""

    may_be_refused = True

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.predictor = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()), mlp(8, 4, 8)

    def losses(self, batch: Any) -> Tensor:
        x, _ = batch
        first, second = self.encoder(x), self.encoder(x + 0.1 * torch.randn_like(x))
        return -F.cosine_similarity(self.predictor(first), second.detach(), dim=1)


class BarlowTwins(Member):
    """A loss of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def losses(self, batch: Any) -> Tensor:
        x, _ = batch
        first, second = (self.encoder(x + 0.1 * torch.randn_like(x)) for _ in range(2))
        correlation = F.normalize(first - first.mean(0), dim=0).T @ F.normalize(second - second.mean(0), dim=0)
        return (correlation - torch.eye(3).to(correlation)).square().sum(1)


class Triplet(Member):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(6, 8, 4)

    def losses(self, batch: Any) -> Tensor:
        x, _ = batch
        anchor, positive, negative = self.encoder(x), self.encoder(x + 0.1), self.encoder(x.flip(0))
        return F.triplet_margin_loss(anchor, positive, negative, margin=2.0, reduction="none")


class Distillation(Member):
    """The teacher is an average of the student's weights, kept in parameters without gradients."""

    may_be_refused = True

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        if self.training:
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.data.lerp_(fast.data, 0.1)
        logits = self.student(x)
        soft = F.kl_div(logits.log_softmax(1), self.teacher(x).softmax(1), reduction="none").sum(1)
        return cross_entropy(logits, y) + soft


# Structure


class FixedPoint(nn.Module):
    """z = tanh(Wz + Ux), by iteration; the last steps are differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(8, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.inner.weight.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros(len(x), 8).to(x)
        for _ in range(30):
            z = torch.tanh(self.inner(z) + self.outer(x))
        return self.head(z)


class ImplicitFixedPoint(FixedPoint):
    """The fixed point is found without a graph, and one step is differentiated: a phantom gradient."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros(len(x), 8).to(x)
        with torch.no_grad():
            for _ in range(30):
                z = torch.tanh(self.inner(z) + self.outer(x))
        return self.head(torch.tanh(self.inner(z) + self.outer(x)))


class NeuralODE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.field, self.head = mlp(6, 8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            x = x + 0.2 * self.field(x)
        return self.head(x)


class HyperNetwork(nn.Module):
    """One network makes the weights of another."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.make = nn.Parameter(torch.randn(4)), nn.Linear(4, 6 * 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.make(self.code).view(6, 3)


class MixtureOfExperts(nn.Module):
    """Sends each example to its best expert; others get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList(mlp(6, 8, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(1)
        chosen = p.argmax(1)
        out = x.new_zeros(len(x), 3)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, p[rows, index, None] * expert(x[rows]))
        return out


class Graph:
    """Nodes, edges and labels, with .to() and nothing else."""

    def __init__(self, x: Tensor, edges: Tensor, y: Tensor) -> None:
        self.x, self.edges, self.y = x, edges, y

    def to(self, device: Any, **options: Any) -> Graph:
        return Graph(*(tensor.to(device, **options) for tensor in (self.x, self.edges, self.y)))


class GraphConvolution(Member):
    """Rewrites the features of its batch layer by layer, as in the tutorials of graph libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 3)])

    def batch(self) -> Any:
        return Graph(torch.randn(EXAMPLES, 6), torch.randint(0, EXAMPLES, (2, 8)), torch.arange(EXAMPLES) % 3)

    def losses(self, batch: Any) -> Tensor:
        for layer in self.layers:
            h = layer(batch.x.to(layer.weight))
            batch.x = torch.tanh(h + torch.zeros_like(h).index_add(0, batch.edges[1], h[batch.edges[0]]))
        return cross_entropy(batch.x, batch.y)


class LowRankAdaptation(nn.Module):
    """Adapters on a frozen backbone, behind re-entrant checkpoints, as in recipes of language models."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6).requires_grad_(False) for _ in range(2))
        self.down = nn.ParameterList(0.3 * torch.randn(2, 6) for _ in range(2))
        self.up = nn.ParameterList(0.3 * torch.randn(6, 2) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def block(self, index: int, x: Tensor) -> Tensor:
        return torch.tanh(self.blocks[index](x) + x @ self.down[index].T @ self.up[index].T)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        for index in range(2):
            x = checkpoint(self.block, index, x, use_reentrant=True)
        return self.head(x)


class MultiTask(Member):
    """Two tasks weighted by learned uncertainties (Kendall, Gal and Cipolla 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = mlp(6, 8, 8), nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 1)])
        self.log_variances = nn.Parameter(torch.zeros(2))

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        h = torch.tanh(self.trunk(x))
        tasks = [cross_entropy(self.heads[0](h), y), (self.heads[1](h)[:, 0] - x.sum(1)).square()]
        return sum((-s).exp() * task + s / 2 for s, task in zip(self.log_variances, tasks, strict=True))


# Training procedures


class Adversarial(Supervised):
    """Attacks its inputs by a backward pass inside the loss, which leaves gradients behind."""

    def __init__(self) -> None:
        super().__init__(mlp(6, 8, 3), (6,), cross_entropy)

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        attacked = x.clone().requires_grad_()
        with torch.enable_grad():
            cross_entropy(self.net(attacked), y).sum().backward()
        return cross_entropy(self.net((x + 0.1 * attacked.grad.sign()).detach()), y)


class Mixup(Supervised):
    """Mixes inputs and labels by random numbers."""

    def __init__(self) -> None:
        super().__init__(mlp(6, 8, 3), (6,), cross_entropy)

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        share, order = torch.distributions.Beta(0.4, 0.4).sample(), torch.randperm(EXAMPLES, device=x.device)
        logits = self.net(share * x + (1 - share) * x[order])
        return share * cross_entropy(logits, y) + (1 - share) * cross_entropy(logits, y[order])


class PolicyGradient(Supervised):
    """REINFORCE with given actions and returns."""

    def __init__(self) -> None:
        super().__init__(mlp(6, 8, 3), (6,), lambda logits, y: (y - 1.0) * cross_entropy(logits, y))


class ProximalPolicy(Supervised):
    """The ratio to the policy itself: one by value, and not by gradient."""

    may_be_refused = True

    def __init__(self) -> None:
        super().__init__(mlp(6, 8, 3), (6,), cross_entropy)

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        log_p = -cross_entropy(self.net(x), y)
        ratio, gain = (log_p - log_p.detach()).exp(), y - 1.0
        return -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)


class TemporalDifference(Member):
    """Q-learning with a stopped target."""

    may_be_refused = True

    def __init__(self) -> None:
        super().__init__()
        self.q = mlp(6, 8, 3)

    def losses(self, batch: Any) -> Tensor:
        x, actions = batch
        with torch.no_grad():
            target = x[:, 0] + 0.9 * self.q(x.flip(1)).amax(1)
        return F.smooth_l1_loss(self.q(x).gather(1, actions[:, None])[:, 0], target, reduction="none")


class GumbelSoftmax(Member):
    """Hard samples with gradients passed straight through."""

    may_be_refused = True

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(6, 8, 3), mlp(3, 8, 6)

    def losses(self, batch: Any) -> Tensor:
        x, _ = batch
        return (self.decoder(F.gumbel_softmax(self.encoder(x), hard=True)) - x).square().mean(1)


class MetaLearner(Member):
    """One step of gradient descent inside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(6, 3))

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        with torch.enable_grad():
            support = cross_entropy(torch.tanh(x.flip(0) @ self.weight), y.flip(0)).mean()
            (slope,) = torch.autograd.grad(support, self.weight, create_graph=True)
        return cross_entropy(torch.tanh(x @ (self.weight - 0.5 * slope)), y)


class NoisyWeights(Supervised):
    """Noise on the weights, from a generator of its own."""

    def __init__(self) -> None:
        super().__init__(mlp(6, 8, 3), (6,), cross_entropy)
        self.generator = torch.Generator().manual_seed(5)

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        noisy = {
            name: p + 0.1 * torch.randn(p.shape, generator=self.generator, dtype=torch.float32).to(p)
            for name, p in self.net.named_parameters()
        }
        return cross_entropy(torch.func.functional_call(self.net, noisy, (x,)), y)


class Curriculum(Supervised):
    """A loss that changes with the number of evaluations."""

    def __init__(self) -> None:
        super().__init__(mlp(6, 8, 3), (6,), cross_entropy)
        self.register_buffer("evaluations", torch.zeros(()))

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        self.evaluations += 1
        logits = self.net(x)
        return cross_entropy(logits, y) + self.evaluations / 20 * logits.square().mean(1)


class WeightNormalized(nn.Sequential):
    """A temporal convolution; torch differentiates its weight normalization wrongly a second time."""

    def __init__(self) -> None:
        convolutions = [nn.Conv1d(1, 4, 3, padding=2, dilation=2), nn.Conv1d(4, 4, 3, padding=2, dilation=2)]
        first, second = map(parametrizations.weight_norm, convolutions)
        super().__init__(nn.Unflatten(1, (1, 6)), first, nn.Tanh(), second, nn.Flatten(), nn.Linear(24, 3))


ZOO: dict[str, Callable[[], Member]] = {
    "GRU of text": lambda: Tokens(Recurrent(nn.GRU), (), cross_entropy),
    "LSTM of text": lambda: Tokens(Recurrent(nn.LSTM), (), cross_entropy),
    "transformer encoder": lambda: Tokens(Encoder(), (), cross_entropy),
    "causal language model": CausalLanguageModel,
    "masked language model": MaskedLanguageModel,
    "CTC": SpeechRecognizer,
    "EmbeddingBag, sum": lambda: BagOfWords("sum"),
    "EmbeddingBag, mean": lambda: BagOfWords("mean"),
    "sparse embedding": SparseEmbedding,
    "U-Net": lambda: Supervised(UNet(), (3, 16, 16), dice),
    "autoencoder": Autoencoder,
    "VAE": VariationalAutoencoder,
    "VQ-VAE": VectorQuantizer,
    "coupling flow": CouplingFlow,
    "energy model": EnergyModel,
    "contrastive divergence": ContrastiveDivergence,
    "spectral discriminator": SpectralDiscriminator,
    "gradient penalty": GradientPenalty,
    "momentum contrast": MomentumContrast,
    "memory queue": FrozenQueue,
    "SimSiam": Siamese,
    "Barlow twins": BarlowTwins,
    "triplet": Triplet,
    "distillation": Distillation,
    "fixed point": lambda: Supervised(FixedPoint(), (6,), cross_entropy),
    "phantom gradient": lambda: Supervised(ImplicitFixedPoint(), (6,), cross_entropy, may_be_refused=True),
    "neural ODE": lambda: Supervised(NeuralODE(), (6,), cross_entropy),
    "hypernetwork": lambda: Supervised(HyperNetwork(), (6,), cross_entropy),
    "mixture of experts": lambda: Supervised(MixtureOfExperts(), (6,), cross_entropy),
    "graph convolution": GraphConvolution,
    "LoRA behind checkpoints": lambda: Supervised(LowRankAdaptation(), (6,), cross_entropy, may_be_refused=True),
    "multi-task": MultiTask,
    "adversarial training": Adversarial,
    "mixup": Mixup,
    "policy gradient": PolicyGradient,
    "proximal policy": ProximalPolicy,
    "temporal difference": TemporalDifference,
    "Gumbel softmax": GumbelSoftmax,
    "meta-learner": MetaLearner,
    "noisy weights": NoisyWeights,
    "curriculum": Curriculum,
    "weight normalization": lambda: Supervised(WeightNormalized(), (6,), cross_entropy, may_be_refused=True),
    "focal loss": lambda: Supervised(mlp(6, 8, 3), (6,), focal),
    "quantile loss": lambda: Supervised(mlp(6, 8, 3), (6,), quantile),
}
