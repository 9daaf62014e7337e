"""SharpnessMonitor and the stability edge of the optimizer."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.helpers.monitored import Plain, dense_hessian, fit, monitor
from tests.helpers.trainers import quiet_trainer

GROUPS = [{"lr": 0.1}, {"lr": 0.01}]


class Grouped(Plain):
    def configure_optimizers(self):
        parts = [list(self.net[0].parameters()), list(self.net[2].parameters())]
        return self.optimizer([{"params": p} | group for p, group in zip(parts, GROUPS, strict=True)], **self.options)


@pytest.mark.parametrize(
    ("module", "metric", "edge"),
    [
        (lambda: Plain(momentum=0.9), None, 2 * 1.9 / 0.1),
        (lambda: Grouped(), lambda o, p: 0.1 if p.shape[0] == 3 else 1.0, 2 / 0.1),
        (
            lambda: Plain(torch.optim.Adam, lr=1e-3),
            lambda o, p: 1 / ((o.state[p]["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8),
            38 / 1e-3 * (1 - 0.9**3),
        ),
    ],
    ids=["heavy ball", "groups", "Adam"],
)
def test_the_edge_ratio_is_that_of_the_optimizer_in_use(module, metric, edge):
    """λ_max of the preconditioned Hessian, formed densely, over the edge; three steps."""
    module = module()
    metrics, trainer = fit(module, monitor(rtol=1e-8, max_iterations=60), precision="64-true")
    matrix = dense_hessian(module)
    if metric is not None:
        parts = [metric(trainer.optimizers[0], p) * torch.ones_like(p) for p in module.parameters()]
        root = torch.cat([part.detach().reshape(-1) for part in parts]).sqrt()
        matrix = root[:, None] * matrix * root
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    assert metrics["sharpness/lambda_max"] == pytest.approx(largest, rel=1e-6)
    assert metrics["sharpness/edge"] == pytest.approx(edge, rel=1e-6)
    assert metrics["sharpness/edge_ratio"] == pytest.approx(largest / edge, rel=1e-6)


def test_without_the_preconditioner_the_hessian_itself_is_measured():
    module = Plain(torch.optim.Adam, lr=1e-3)
    metrics, _ = fit(module, monitor(preconditioned=False, rtol=1e-8), precision="64-true")
    assert metrics["sharpness/lambda_max"] == pytest.approx(
        float(torch.linalg.eigvalsh(dense_hessian(module))[-1]), rel=1e-6
    )
    assert "sharpness/edge_ratio" not in metrics
    metrics, _ = fit(Plain(), monitor(preconditioned=False))
    assert metrics["sharpness/edge"] == pytest.approx(20.0)


def test_weight_decay_of_the_optimizer_brings_the_edge_nearer():
    module = Plain(weight_decay=0.5)
    metrics, _ = fit(module, monitor(rtol=1e-8), precision="64-true")
    largest = float(torch.linalg.eigvalsh(dense_hessian(module))[-1])
    assert metrics["sharpness/lambda_max"] == pytest.approx(largest, rel=1e-6)
    assert metrics["sharpness/edge_ratio"] == pytest.approx((largest + 0.5) / 20.0, rel=1e-6)


def test_an_optimizer_that_is_not_known_has_no_edge_and_is_named_once():
    with pytest.warns(UserWarning, match=r"stability edge of Rprop is not known") as caught:
        metrics, _ = fit(Plain(torch.optim.Rprop), monitor())
    assert len([w for w in caught if "Rprop" in str(w.message)]) == 1
    assert "sharpness/lambda_max" in metrics
    assert not {"sharpness/edge", "sharpness/edge_ratio"} & metrics.keys()
    with pytest.raises(ValueError, match="preconditioned=True needs a known stability edge, and Rprop has none"):
        fit(Plain(torch.optim.Rprop), monitor(preconditioned=True))
    fit(Plain(torch.optim.Rprop), monitor(preconditioned=False))  # without a warning, which would be an error


def test_at_a_learning_rate_of_zero_the_metric_stays_and_nothing_is_unstable():
    module = Plain(torch.optim.Adam, lr=1e-3)
    rates = [1e-3, 1e-3, 0.0]
    module.on_train_batch_start = lambda *_: module.optimizers().param_groups[0].update(lr=rates.pop(0))
    values = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            values.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    trainer = quiet_trainer(callbacks=[monitor(), Watch()], max_epochs=3)
    trainer.fit(module)
    # Adam's preconditioner changes by a few percent in a step, and is about a hundred
    assert values[2]["sharpness/lambda_max"] > 0.2 * values[1]["sharpness/lambda_max"]
    assert values[2]["sharpness/edge_ratio"] == 0.0
    assert values[2]["sharpness/edge"] == values[1]["sharpness/edge"]  # the last finite one


def test_an_optimizer_that_maximizes_has_no_edge():
    class Maximizing(Plain):
        def training_step(self, batch, batch_idx):
            return -super().training_step(batch, batch_idx)["loss"]

    with pytest.warns(UserWarning, match="stability edge of SGD is not known"):
        metrics, _ = fit(Maximizing(maximize=True), monitor())
    assert "sharpness/edge_ratio" not in metrics
