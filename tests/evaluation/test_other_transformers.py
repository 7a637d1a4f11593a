"""Checkpoints of one training that was continued with another version of transformers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as installed

from mlflow_soup.evaluation.compatibility import differences
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.weights import soup
from mlflow_soup.weights.checkpoint import SINGLE
from mlflow_soup.weights.find import find_checkpoint

OLDER = ("4.57.1", "5.1.0")
SAVED_BY = Path(__file__).with_name("saved_by.py")

pytestmark = pytest.mark.slow


def saved_by(path: str, folder: Path) -> list[Path]:
    """The folders that `saved_by.py` makes with the packages at a path."""
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, SAVED_BY, folder], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return sorted(folder.iterdir())


def go_on(folder: Path, root: Path) -> Path:
    """Load a checkpoint with this version, train it a little, and save it again."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (0.02 * noise).to(parameter.dtype)
    model.save_pretrained(root / folder.name)
    AutoTokenizer.from_pretrained(folder).save_pretrained(root / folder.name)
    return root / folder.name


def is_mixed_alike(pair, out: Path) -> bool:
    """Whether the live model, the written soup and torch's own lerp have the same bits."""
    found = [find_checkpoint(folder, folder.parent.name) for folder in pair]
    live = LiveModel(found[1], "cpu")
    live.set_weights(live.link(found), (0.4, 0.6))
    out.mkdir()
    soup.write(found, (0.4, 0.6), out)
    first, second, written = (load_file(folder / SINGLE) for folder in (*pair, out))
    for name, tensor in written.items():
        expected = torch.lerp(first[name], second[name], torch.tensor(0.6).to(tensor.dtype))
        torch.testing.assert_close(tensor, expected, rtol=2e-2, atol=1e-3)
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    return all(torch.equal(t, reloaded[name]) for name, t in live.model.state_dict().items())


@pytest.mark.parametrize("version", OLDER)
def test_a_training_that_changed_its_version_of_transformers_is_merged(tmp_path, figures, version):
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
    subprocess.run([*install, f"transformers=={version}"], check=True, capture_output=True)
    before = saved_by(str(packages), tmp_path / version)
    anew = saved_by("", tmp_path / installed)
    refused, unlike = {}, []
    for folder in before:
        pair = (folder, go_on(folder, tmp_path / "continued"))
        refused |= {folder.name: lines} if (lines := find_differences(pair)) else {}
        if not lines and not is_mixed_alike(pair, tmp_path / f"soup of {folder.name}"):
            unlike.append(folder.name)
    # a config that was made anew may have other defaults, which is another model
    others = [f.name for f, g in zip(before, anew, strict=True) if find_differences((f, g))]
    figures[f"architectures, saved by transformers {version} and {installed}"] = {
        "tried": len(before),
        "merged": len(before) - len(refused),
        "live = reloaded": len(before) - len(refused) - len(unlike),
        "unlike if the config is made anew": others,
    }
    assert len(before) > 20
    assert refused == {}
    assert unlike == []
    assert len(others) < 4


def find_differences(pair) -> list[str]:
    return differences(*(find_checkpoint(folder, folder.parent.name) for folder in pair))
