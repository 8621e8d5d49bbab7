"""A bundle as a repository of the Hugging Face hub: model card, what diffusers needs, download and upload."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cdm_lightning.cascade.metadata import origin
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.files import write_atomically

# diffusers runs this file if it is told to (`custom_pipeline`); this project never does.
PIPELINE = '''"""The pipeline of this cascade for diffusers; it needs the package cdm_lightning."""

from cdm_lightning.cascade.diffusers_pipeline import CascadePipeline as CascadePipeline
'''
MARK = "<!-- Written from bundle.json, and written again with it: remove this line to keep changes. -->"
HUB_FILES = ("README.md", "model_index.json", "pipeline.py")
DOWNLOADED = ["bundle.json", "*.safetensors", "README.md"]  # all that is downloaded: no code


def write_hub_files(folder: Path, metadata: dict[str, Any], own: bytes | None = None) -> None:
    """Write what makes a bundle a hub repository: README.md (the model card), model_index.json and pipeline.py.

    metadata: bundle.json as a dictionary. own: a person's README.md, from `own_card`; None keeps that of `folder`, and
    without one the model card is written.
    """
    from diffusers import __version__

    component = ["cdm_lightning.cascade.diffusers_pipeline", "CascadeModel"]
    index = {"_class_name": ["pipeline", "CascadePipeline"], "_diffusers_version": __version__, "cascade": component}
    own = own_card(folder) if own is None else own
    write_atomically(folder / "README.md", card(metadata).encode() if own is None else own)
    write_atomically(folder / "model_index.json", (json.dumps(index, indent=1) + "\n").encode())
    write_atomically(folder / "pipeline.py", PIPELINE.encode())


def own_card(folder: Path) -> bytes | None:
    """The README.md of a bundle if a person wrote or changed it; None for a card written from bundle.json, or none."""
    readme = folder / "README.md"
    text = readme.read_bytes() if readme.is_file() else MARK.encode()
    return None if MARK.encode() in text else text


def card(metadata: dict[str, Any]) -> str:
    """The model card, Markdown: what the cascade is, its data, stages, figures, limits, and how to use it.

    Everything in it is known to bundle.json; what is not known is said to be unknown.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cdm_lightning.cascade", "."), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,  # Markdown; the hub escapes it
    )  # fmt: skip
    stages = []
    for entry in metadata["stages"]:
        arguments, trained = entry["arguments"], entry.get("trained", {})
        low = arguments.get("low_resolution")
        stages.append({
            "name": entry["weights"].removesuffix(".safetensors"), "resolution": arguments["resolution"], "low": low,
            "steps": trained.get("steps"), "images": trained.get("images"), "imported": trained.get("imported"),
            "augmentation": arguments.get("augmentation", "none") if low else "",
            "sampler": arguments.get("sampler"),
            "sampling_steps": arguments.get("sampling_steps") or arguments.get("timesteps"),
        })  # fmt: skip
    num_classes = next((n for entry in metadata["stages"] if (n := entry["arguments"].get("num_classes"))), None)
    known, search = origin(metadata), metadata.get("search") or {}
    search = {"levels": metadata.get("levels"), "truncated": metadata.get("truncated"), **search}
    rows = [row for row in search.get("rows", []) if row["stage"] == stages[-1]["name"]]
    # The hub has no tag of a pipeline that takes a class.
    front_matter = ModelCardData(
        library_name="cdm_lightning", tags=["cascaded-diffusion", "diffusers"], license=metadata.get("license"),
        pipeline_tag=None if num_classes else "unconditional-image-generation",
    )  # fmt: skip
    return environment.get_template("card.md.jinja").render(
        front_matter=front_matter.to_yaml(), mark=MARK, num_classes=num_classes,
        stages=stages, last=stages[-1], classes=known["classes"], crop=known["crop"],
        data=metadata.get("data"), levels=metadata.get("levels") or [],
        truncated=metadata.get("truncated"),
        search=search, figures=search.get("figures", []), rows=rows, conclusion=search.get("conclusion"),
    )  # fmt: skip


def download(repo: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The folder of a bundle on the hub, such as "user/name", in the local cache: weights, bundle.json, card, no code.

    Raises InputError if it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, cache_dir=cache_dir, allow_patterns=DOWNLOADED))
    except Exception as error:  # its errors of names, networks, permissions and disks have no common class
        line = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"{repo} is no folder here, and as a repository of the hub it could not be had: "
            f"{type(error).__name__}: {line}"
        ) from error


def upload(folder: Path, repo: str, private: bool = False, token: str | None = None) -> str:
    """Create the repository on the hub if need be, and upload the bundle `folder`; gives its address.

    A README.md that a person wrote or changed on the hub stays, unless the bundle has one of a person too. Raises
    InputError if it cannot be done.
    """
    from huggingface_hub import HfApi

    api, left = HfApi(token=token), []
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if own_card(folder) is None and api.file_exists(repo, "README.md"):
            there = Path(api.hf_hub_download(repo, "README.md"))
            left = [] if own_card(there.parent) is None else ["README.md"]
            if left:
                print(f"{repo}: its README.md is a person's and stays; it may tell of another cascade", file=sys.stderr)
        return str(
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a cascade", ignore_patterns=left)
        )
    except Exception as error:  # as above
        line = next(iter(str(error).splitlines()), "")
        raise InputError(f"{repo} could not be uploaded to the hub: {type(error).__name__}: {line}") from error
