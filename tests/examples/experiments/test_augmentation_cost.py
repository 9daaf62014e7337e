from types import SimpleNamespace

from examples.experiments import augmentation_cost as cost
from examples.experiments.common import start
from examples.experiments.problems import augmentation
from lightning_ifthpo.hyperparameters import RandomDistortion


def test_plain_and_augmented_stretches_take_turns_and_hyper_steps_end_the_augmented(monkeypatch):
    """A clock that stands still but for augmentations and hyper steps."""
    clock = SimpleNamespace(now=0)

    def tick(seconds):
        clock.now += seconds

    class Ticking(RandomDistortion):
        def forward(self, images):
            tick(self.training)
            return super().forward(images)

    class Classifier(augmentation.Classifier):
        def configure_hyper_optimizer(self):
            optimizer = super().configure_hyper_optimizer()
            optimizer.register_step_post_hook(lambda *_: tick(100))
            return optimizer

    start()
    monkeypatch.setattr(cost, "time", SimpleNamespace(process_time=lambda: clock.now))
    monkeypatch.setattr(cost, "Classifier", Classifier)
    monkeypatch.setattr(cost, "resnet18", lambda: augmentation.network(3, 10))
    plain, augmented, *others = cost.seconds(Ticking(), rounds=2, batch_size=2)
    assert plain == [0, 0]
    assert augmented[0] == 1
    assert 100 < augmented[1] < 120  # an iteration, and the evaluations of a hyper step
    assert others == [plain, augmented]


def test_costs_add_up(tmp_path, monkeypatch, capsys):
    plain, augmented = [2.0, 2.0], [2.2, 32.2]
    monkeypatch.setattr(cost, "seconds", lambda *_: [plain, augmented, plain, augmented])
    result = cost.main(["--augmentations", "U-Net", "--output", str(tmp_path)])
    measured = {name: entry["measured"] for name, entry in result.items()}
    # in plain iterations: 1.1 for an augmented one, 15 for a hyper step; six tenths of a run make hyper steps
    assert measured == {
        "U-Net, iteration, every 5": 4.1,
        "U-Net, run, every 5": 2.9,
        "U-Net, iteration, every 10": 2.6,
        "U-Net, run, every 10": 2.0,
        "U-Net, iteration, every 15": 2.1,
        "U-Net, run, every 15": 1.7,
    }
