"""Train a model of the package from random weights, on photographs and drawn images.

usage: python -m training.train --output runs/first
"""

import argparse
import copy
import csv
import pickle
import time
from dataclasses import asdict
from pathlib import Path

import torch

from aliked import cli
from aliked.errors import InputError
from aliked.files import whole_file, writable_folder
from aliked.model import ALIKED
from aliked.transfer import choose_device
from training.appearance import change_appearance
from training.geometry import ViewPairs, random_pairs
from training.model import TrainableALIKED
from training.objective import pair_losses, weighted_sum
from training.pool import TRAIN, make_pool
from training.schedule import average_decay, geometry_share, learning_rate
from training.settings import Settings, load_settings
from training.validation import make_pairs, validate

CONFIG = Path(__file__).parent / "config.toml"


def random_model(name: str) -> TrainableALIKED:
    """A model with random weights to start from.

    The aggregation weights are drawn about 0 at the scale of their inputs: the uniform ones of
    the class are all positive, so that all descriptors would begin as nearly the same.
    """
    model = TrainableALIKED(name)
    weights = model.desc_head.agg_weights
    torch.nn.init.normal_(weights, std=(weights.shape[0] * weights.shape[1]) ** -0.5)
    return model


class Trainer:
    """A model, its average, its optimiser and how far they have come."""

    def __init__(self, settings: Settings, device: torch.device):
        torch.manual_seed(settings.run.seed)
        self.settings, self.device = settings, device
        self.step, self.seconds = 0, 0.0
        self.generator = torch.Generator(device).manual_seed(settings.run.seed)
        # Channels last: convolutions in half precision run on tensor cores without transposing.
        self.model = random_model(settings.run.model).to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        cuda = device.type == "cuda"
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), weight_decay=settings.optimiser.weight_decay, fused=cuda
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=cuda)
        self.half_precision = cuda

    def parts(self) -> dict[str, object]:
        """What a checkpoint holds by name."""
        names = ("model", "average", "optimiser", "scaler")
        return {name: getattr(self, name) for name in names}

    def save(self, path: Path) -> None:
        """Write everything that `load` needs, whole or not at all."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {"step": self.step, "seconds": self.seconds}
        state["generator"] = self.generator.get_state()
        with whole_file(path) as partial:
            torch.save(state, partial)

    def load(self, path: Path) -> None:
        """Go on where `path` was saved; `InputError` where it is no checkpoint of this model."""
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            for name, part in self.parts().items():
                part.load_state_dict(state[name])
            self.generator.set_state(state["generator"].cpu())
        except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
            raise InputError(f"cannot resume from {path}: {error}") from error
        self.step, self.seconds = state["step"], state["seconds"]

    def export(self, path: Path) -> None:
        """Write the averaged weights as the state dict that `ALIKED.from_pretrained` loads."""
        state = self.average.state_dict()
        state = {name: value.contiguous().cpu() for name, value in state.items()}
        with whole_file(path) as partial:
            torch.save(state, partial)

    def draw_pair(self, pool: torch.Tensor, progress: float) -> ViewPairs:
        """A fresh batch of views of random images of the pool, uint8 [N, H, W, 3].

        The image sizes take turns; a batch has as many pairs as have about `batch_pixels`.
        """
        run, settings = self.settings.run, self.settings
        size = run.image_sizes[self.step % len(run.image_sizes)]
        count = max(1, run.batch_pixels // size**2)
        chosen = torch.randint(len(pool), (count,), generator=self.generator, device=self.device)
        sources = pool[chosen].permute(0, 3, 1, 2).float() / 255
        share = geometry_share(progress, settings.geometry)
        pair = random_pairs(sources, size, settings.geometry, share, self.generator)
        first, second = (
            change_appearance(v, settings.appearance, self.generator) for v in pair[:2]
        )
        return ViewPairs(first, second, pair.homography)

    def train_step(self, pool: torch.Tensor, progress: float) -> dict[str, torch.Tensor]:
        """One update; the unweighted losses by name."""
        options = self.settings.optimiser
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(progress, options)
        pair = self.draw_pair(pool, progress)
        parts = pair_losses(
            self.model, pair, self.settings.losses, self.generator, self.half_precision
        )
        self.optimiser.zero_grad()
        self.scaler.scale(weighted_sum(parts, self.settings.losses)).backward()
        self.scaler.unscale_(self.optimiser)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.max_gradient)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.step += 1
        update_average(self.average, self.model, average_decay(self.step, options))
        return {name: value.detach() for name, value in parts.items()}


@torch.no_grad()
def update_average(average: ALIKED, model: ALIKED, decay: float) -> None:
    """Move the averaged weights and batch norm statistics towards the model's."""
    kept, new = (list(each.state_dict().values()) for each in (average, model))
    floating = [i for i, value in enumerate(kept) if value.is_floating_point()]
    torch._foreach_lerp_([kept[i] for i in floating], [new[i] for i in floating], 1 - decay)
    for i in set(range(len(kept))) - set(floating):
        kept[i].copy_(new[i])


class Log:
    """A CSV file that grows, with its header from the first row; each row is printed too."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, row: dict[str, float]) -> None:
        """Append one row."""
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)


class Clock:
    """The share of the training that is over, by steps or by seconds, whichever is further."""

    def __init__(self, trainer: Trainer, budget_seconds: float, max_seconds: float):
        self.trainer, self.budget, self.limit = trainer, budget_seconds, max_seconds
        self.start, self.before = time.monotonic(), trainer.seconds

    def tick(self) -> float:
        """Note the time in the trainer; progress in [0, 1]."""
        elapsed = time.monotonic() - self.start
        self.trainer.seconds = self.before + elapsed
        steps = self.trainer.settings.run.steps
        return min(1.0, max(self.trainer.step / steps, self.trainer.seconds / self.budget))

    def out_of_time(self) -> bool:
        """Whether this process has run as long as it may."""
        return self.trainer.seconds - self.before >= self.limit


def train(
    trainer: Trainer, pool: torch.Tensor, pairs: list[ViewPairs], clock: Clock, out: Path
) -> None:
    """Train until the end or until the clock stops; log, validate and save on the way."""
    run = trainer.settings.run
    losses, scores = Log(out / "losses.csv"), Log(out / "validation.csv")
    totals: dict[str, torch.Tensor] = {}
    while (progress := clock.tick()) < 1 and not clock.out_of_time():
        parts = trainer.train_step(pool, progress)
        totals = {name: totals.get(name, 0) + value for name, value in parts.items()}
        now = {"step": trainer.step, "seconds": trainer.seconds}
        if trainer.step % run.log_every == 0:
            rate = learning_rate(progress, trainer.settings.optimiser)
            means = {name: float(total) / run.log_every for name, total in totals.items()}
            losses.write({**now, "rate": rate, **means})
            totals = {}
        if trainer.step % run.validate_every == 0:
            scores.write({**now, **measure(trainer, pairs)})
            trainer.save(out / "checkpoint.pt")
    scores.write({"step": trainer.step, "seconds": trainer.seconds, **measure(trainer, pairs)})
    trainer.save(out / "checkpoint.pt")


def measure(trainer: Trainer, pairs: list[ViewPairs]) -> dict[str, float]:
    """The validation scores of the averaged weights."""
    return asdict(validate(trainer.average, pairs, trainer.settings.validation.top_k))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help="settings")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="results go here")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on from a checkpoint.pt")
    parser.add_argument(
        "--budget_seconds",
        type=float,
        default=float("inf"),
        help="end after this time in all, resumed runs included, if before the last step; the "
        "learning rate follows (default: no limit)",
    )
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=float("inf"),
        help="stop this process after this time, with a checkpoint to resume from "
        "(default: no limit)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--smoke", action="store_true", help="a few steps on tiny images")
    return parser


def main(args: argparse.Namespace) -> None:
    """Make the images, train, and write weights, checkpoint and logs into `--output`."""
    settings = load_settings(args.config, args.smoke)
    device = choose_device(args.device)
    out = writable_folder(args.output)
    started = time.monotonic()
    images = make_pool(TRAIN, settings.run.seed, settings.pool)
    pairs = make_pairs(settings, device)
    print(f"{len(images)} images made in {time.monotonic() - started:.0f} s", flush=True)
    torch.backends.cudnn.benchmark = True  # batches have few shapes
    trainer = Trainer(settings, device)
    if args.resume:
        trainer.load(args.resume)
    clock = Clock(trainer, args.budget_seconds, args.max_seconds)
    train(trainer, torch.from_numpy(images).to(device), pairs, clock, out)
    weights = out / f"{settings.run.model}-homography.pth"
    trainer.export(weights)
    print(f"wrote {weights} after {trainer.step} steps")


if __name__ == "__main__":
    cli.run(main, parser())
