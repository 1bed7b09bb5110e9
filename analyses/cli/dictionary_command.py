"""dictionary train: a small sparse autoencoder or transcoder for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from analyses.cli.app import app
from analyses.cli.options import Checkpoint, Device, Dtype, Model, Seed, TrustRemoteCode, clean_errors, say

dictionary = typer.Typer(help="Sparse autoencoders and transcoders.", no_args_is_help=True)
app.add_typer(dictionary, name="dictionary")


@dictionary.command()
@clean_errors
def train(
    *,
    text: Annotated[Path, typer.Option(help="A text file to train on.")],
    point: Annotated[str, typer.Option(help="HookPoint that is read, such as blocks.9.hook_resid_post or blocks.9.ln2.hook_out.")],
    point_out: Annotated[str | None, typer.Option(help="HookPoint that a transcoder writes; --point for an autoencoder.")] = None,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("dictionary"),
    model: Model = "embedded",
    features: Annotated[int, typer.Option(min=1, help="How many features.")] = 4096,
    k: Annotated[int, typer.Option(min=1, help="How many of them are on at a token.")] = 32,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the text.")] = 1,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 128,
    checkpoint: Checkpoint = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a TopK autoencoder or transcoder, and say how good it is on text that was held out."""
    from analyses.dictionaries import save_dictionary, train_dictionary
    from analyses.dictionaries.activations import token_rows
    from analyses.models.loading import load_model

    loaded = load_model(model, trust_remote_code, dtype=dtype, device=device)
    rows = token_rows(loaded, text.read_text(encoding="utf-8"), context)
    trained = train_dictionary(
        loaded, rows, point, point_out=point_out, n_features=features, k=k, epochs=epochs, seed=seed, checkpoint=checkpoint
    )
    say(trained.quality)
    say(f"written to {save_dictionary(trained.dictionary, out)}")
