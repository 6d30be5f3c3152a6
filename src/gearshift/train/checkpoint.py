"""Checkpoints: what a run needs to go on as if it had never stopped. Written aside and renamed, so always whole."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gearshift.train.loop import Distiller, Progress


class Checkpoints:
    """The checkpoints of a run, of which the last one is kept."""

    def __init__(self, folder: Path):
        self.folder = folder

    def latest(self) -> Path | None:
        """The last checkpoint, None if there is none."""
        return max(self.folder.glob("step-*"), default=None)

    def save(self, distiller: Distiller) -> Path:
        """Write a checkpoint, then remove those before it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"step-{distiller.global_step:08d}-stage-{distiller.progress.stage:02d}"
        parameters = dict(distiller.model.named_parameters())
        with replacing(target) as fresh:
            save_file({name: parameters[name].detach() for name in distiller.scales}, fresh / "weights.safetensors")
            if distiller.optimiser is not None:
                torch.save(distiller.optimiser.state_dict(), fresh / "optimiser.pt")
            if distiller.average is not None:
                torch.save(distiller.average.state_dict(), fresh / "average.pt")
            progress = {"stage": distiller.progress.stage, "step": distiller.progress.step}
            (fresh / "progress.json").write_text(json.dumps(progress))
        for path in self.folder.iterdir():
            if path != target:
                shutil.rmtree(path)
        return target

    def remove(self) -> None:
        """Remove them all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def restore(self, distiller: Distiller) -> bool:
        """Bring a fresh distiller to the last checkpoint; False if there is none. ValueError if it cannot be read."""
        path = self.latest()
        if path is None:
            return False
        try:
            weights = load_file(path / "weights.safetensors")
            progress = json.loads((path / "progress.json").read_text())
            moments, averages = (_load_if_there(path / name) for name in ("optimiser.pt", "average.pt"))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"the checkpoint {path} cannot be read ({error}): remove it to start over") from None
        if weights.keys() != distiller.scales.keys():
            raise ValueError(f"the checkpoint {path} holds other parameters than those that learn in this run")
        with torch.no_grad():
            for name, parameter in distiller.model.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
        distiller.progress = Progress(progress["stage"], progress["step"])
        if moments is not None:
            distiller.optimiser, distiller.average = distiller.make_optimiser(), distiller.make_average()
            distiller.optimiser.load_state_dict(moments)
        if distiller.average is not None and averages is not None:
            distiller.average.load_state_dict(averages)
        return True


def _load_if_there(path: Path) -> dict[str, Any] | None:
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


class replacing:  # noqa: N801 - reads as a verb
    """A folder to write into that takes the place of `target` once all went well, and vanishes if not."""

    def __init__(self, target: Path):
        self.target = target
        self.fresh = target.with_name(f".{target.name}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.fresh, ignore_errors=True)
        self.fresh.mkdir(parents=True)
        return self.fresh

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            with suppress(OSError):
                shutil.rmtree(self.fresh)
            return
        if self.target.exists():
            shutil.rmtree(self.target)
        self.fresh.rename(self.target)
