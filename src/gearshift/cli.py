"""The command line: one function a verb."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from gearshift.arguments import Command, interrupt_again, tell_torchrun

if TYPE_CHECKING:
    from gearshift.train import Recipe

app = typer.Typer(
    name="gearshift",
    help="One checkpoint, many speeds: give a pretrained language model several token mixers a layer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A model folder, a .gguf file, or a hub name such as org/name.")]
TextFile = Annotated[Path, typer.Option("--text", help="A text file, or a folder of them.")]
Placements = Annotated[
    list[str], typer.Option("--placement", help="A preset, a list such as `attention*3,gdn*27`, or `@file.json`.")
]
OnePlacement = Annotated[
    str | None, typer.Option("--placement", help="A preset, a list such as `attention*3,gdn*27`, or `@file.json`.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, changed.")]


@app.command(cls=Command)
def convert(
    source: Annotated[str, typer.Argument(help="A model folder, a .gguf file, or a hub name. Its format is detected.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    surgery: Annotated[list[Path] | None, typer.Option("--surgery", help="YAML files of edits, in order.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="The dtype of all weights; the source's if left out.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan as a tree, read and write nothing.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read SOURCE's weights from pickles where it has no safetensors.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Turn a checkpoint into a Gearshift one, changed by surgeries."""
    from gearshift.conversion import convert as plan_conversion
    from gearshift.plan import render
    from gearshift.progress import bar
    from gearshift.surgery import load_surgery

    conversion = plan_conversion(source, [load_surgery(path) for path in surgery or []], dtype, allow_pickle)
    if dry_run:
        out.print(render(conversion.plan))
        return
    with bar(err, f"writing {target}", conversion.bytes) as advance:
        conversion.write(target, overwrite, advance)
    out.print(f"{target}: {conversion.bytes / 1e9:.3g} GB, {conversion.checkpoint.format.name} -> gearshift")


@app.command(cls=Command)
def info(
    model: Model,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print the complete, explicit config as YAML.")] = False,
) -> None:
    """Show what is in a checkpoint: blocks, pattern, parameters, state, presets."""
    from gearshift import inspect
    from gearshift.formats import open_checkpoint

    checkpoint = open_checkpoint(model)
    if resolved:
        print(inspect.resolved(checkpoint.native), end="")
    else:
        out.print(inspect.summary(checkpoint), soft_wrap=False, width=None if out.is_terminal else 100)


@app.command(cls=Command)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A model folder, a .gguf file, or a hub name.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, of any format.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Cut no list, and show each layer by itself.")] = False,
) -> None:
    """Show what differs between two models: settings, tensor names, shapes and dtypes, values.

    Tensors go by Gearshift's names, so that two formats of one model are equal. A tensor's relative difference is
    max |a - b| / max |a|. The exit status is 0 if nothing differs, 1 if something does, and 2 for bad input.
    """
    from gearshift.diff import bytes_to_compare, compare
    from gearshift.diff_report import render
    from gearshift.formats import open_checkpoint
    from gearshift.progress import bar

    first, second = open_checkpoint(a), open_checkpoint(b)
    with bar(err, "comparing", bytes_to_compare(first, second)) as advance:
        found = compare(first, second, advance)
    if as_json:
        print(json.dumps(found.to_json_dict(), indent=2, allow_nan=False))
    else:
        out.print(render(found, everything), soft_wrap=False)
    if not found.equal:
        raise typer.Exit(1)


@app.command(cls=Command)
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Overrides = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print the memory that each stage needs, from configs alone; do nothing.")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="With --estimate: on so many GPUs, here or elsewhere.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option("--memory", min=0, help="With --estimate: the GB of each device, if it is not here.")
    ] = None,
) -> None:
    """Distil a supernet by a recipe. Run again, it goes on from its last checkpoint.

    On several GPUs: `torchrun --nproc-per-node N -m gearshift train RECIPE`. With --estimate, the exit status is 1 if a
    stage needs more memory than the device has, where that is known.
    """
    from contextlib import nullcontext

    from gearshift.progress import bar, say_if_piped, silent
    from gearshift.train import TrainingDivergedError, load_recipe, show_steps
    from gearshift.train import train as run_recipe
    from gearshift.train.parallel import process_group

    if (gpus is not None or memory is not None) and not estimate:
        raise ValueError("--gpus and --memory say what to estimate for: add --estimate")
    with process_group() as first:
        settings = load_recipe(recipe, overrides or [])
        if estimate:
            if first:
                _print_estimate(settings, gpus, memory)
            return
        with bar(err, "training", settings.total_steps) if first else nullcontext(silent) as advance:
            try:
                shown = show_steps(err, advance, len(settings.stages))
                result = run_recipe(settings, shown, begun=lambda line: say_if_piped(err, line))
            except TrainingDivergedError as error:
                if first:
                    err.print(f"gearshift: {error}", soft_wrap=True, highlight=False, markup=False)
                tell_torchrun(str(error))
                raise typer.Exit(1) from None
    if not first:
        return
    if result.already_finished:
        out.print(f"{result.model}: this run was finished before, nothing is left to do")
    else:
        resumed = "" if result.resumed_at is None else f", resumed at step {result.resumed_at}"
        out.print(f"{result.model}: {result.steps} steps{resumed}")


def _print_estimate(recipe: "Recipe", gpus: int | None, gigabytes: float | None) -> None:
    from gearshift.train.estimate import advice, device_memory, estimate, remarks, table

    if gigabytes is not None and gigabytes * 1e9 < 1:
        raise ValueError(f"--memory is what a device has in GB, not {gigabytes}")
    with err.status("estimating"):
        stages = estimate(recipe, gpus)
        memory = device_memory(recipe, gpus) if gigabytes is None else round(gigabytes * 1e9)
        said = remarks(recipe, stages)
        too_large = [] if memory is None else advice(recipe, stages, memory, gpus)
    out.print(table(stages, memory))
    for sentence in (*said, *too_large):
        out.print(sentence)
    if too_large:
        raise typer.Exit(1)


@app.command(cls=Command)
def report(
    run: Annotated[Path, typer.Argument(help="The output folder of a training run.")],
    target: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page to write. Default: RUN/report.html.")
    ] = None,
) -> None:
    """Show a run's curves and heat maps so far, as one HTML page and a short table: also while it runs."""
    from gearshift.report.history import read_history
    from gearshift.report.run_page import HEADS, left_out, stage_rows, status, write_run

    history = read_history(run)
    page = target or run / "report.html"
    write_run(history, page)
    table = Table(box=None)
    for place, column in enumerate(HEADS):
        table.add_column(column, justify="right" if 0 < place < len(HEADS) - 1 else "left")
    for row in stage_rows(history):
        table.add_row(*row)
    out.print(table)
    for line in (status(history), *left_out(history), f"report: {page}"):
        out.print(line)


@app.command("eval", cls=Command)
def evaluate(
    model: Model,
    placement: Placements,
    text: TextFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    sequence_length: Annotated[int | None, typer.Option(min=2, help="Tokens a sequence; up to 1024 by itself.")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="At most this many sequences of the text.")] = 16,
    skip: Annotated[int, typer.Option(min=0, help="Positions at the start of each sequence that do not count.")] = 0,
    stride: Annotated[int, typer.Option(min=1, help="Judge every so many positions.")] = 1,
) -> None:
    """Measure placements: divergence from the teacher, perplexity, agreement, and what a token costs."""
    from gearshift.conversion import load
    from gearshift.data import load_sequences, read_text
    from gearshift.evaluate import Judge, JudgeSettings
    from gearshift.model import cost_table
    from gearshift.progress import bar

    content = read_text(text)
    loaded, tokenizer = load(model)
    chosen = [loaded.placement(value) for value in placement]
    length = sequence_length or min(1024, loaded.spec.max_positions)
    held_out = load_sequences(content, tokenizer, length, sequences)
    judge = Judge(loaded, held_out, JudgeSettings(skip=skip, stride=stride))
    with bar(err, "evaluating", judge.planned(chosen)) as advance:
        scores = judge.score(chosen, advance)
    costs = cost_table(loaded.spec, str(loaded.dtype).removeprefix("torch."))
    rows = [
        {
            "name": name,
            "placement": str(score.placement),
            "divergence": score.divergence,
            "perplexity": score.perplexity,
            "agreement": score.agreement,
            "cost": costs.of(score.placement),
        }
        for name, score in zip(placement, scores, strict=True)
    ]
    if as_json:
        print(json.dumps({"positions": judge.positions, "cost_unit": costs.unit, "scores": rows}, indent=2))
        return
    table = Table(box=None, caption=f"{judge.positions:,} positions, sequences of {length} tokens; {costs.unit}")
    for column in ("placement", "divergence", "perplexity", "agreement", "MB a token"):
        table.add_column(column, justify="left" if column == "placement" else "right")
    for row, score in zip(rows, scores, strict=True):
        numbers = (f"{row['divergence']:.4f}", f"{row['perplexity']:.3f}", f"{row['agreement']:.1%}")
        table.add_row(str(row["name"]), *numbers, f"{costs.of(score.placement) / 1e6:,.1f}")
    out.print(table)


@app.command(cls=Command)
def search(
    model: Model,
    text: TextFile,
    budget: Annotated[
        list[str],
        typer.Option(
            "--budget", help="A share of the cost span (`0.5`) or layers by mixer (`attention=8`); `NAME:` first."
        ),
    ],
    target: Annotated[Path, typer.Option("--out", help="The folder for the results.")],
    overrides: Overrides = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="YAML settings of the search.")] = None,
    save_presets: Annotated[
        bool,
        typer.Option("--save-presets", help="Name the placements found in MODEL's config, by their budgets' NAME."),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Find the best placement for each budget."""
    from gearshift.conversion import load, open_checkpoint
    from gearshift.conversion import save_presets as save
    from gearshift.data import load_sequences, read_text
    from gearshift.model import cost_table
    from gearshift.progress import bar
    from gearshift.search import SearchSettings, check_budgets, check_folder, name_budgets, write_result
    from gearshift.search import search as run_search
    from gearshift.settings import load_settings

    settings = load_settings(SearchSettings, recipe, overrides or [])
    budgets = name_budgets(budget)
    check_folder(target, overwrite)
    content = read_text(text)
    native = open_checkpoint(model).native
    length = settings.length_for(native.spec)
    cost = cost_table(native.spec, native.dtype, settings.context)
    check_budgets(native.spec, budgets, cost)
    loaded, tokenizer = load(model)
    sequences = load_sequences(content, tokenizer, length, settings.sequences)
    with bar(err, "searching", 1) as advance:
        result = run_search(loaded, sequences, budgets, cost, settings, advance=advance)
    write_result(result, target, overwrite)
    if save_presets:
        save(model, result.placements)
    table = Table(box=None, caption=f"cost: {result.cost_unit}; results in {target}")
    for column in ("name", "budget", result.metric, "cost", "placement"):
        table.add_column(column, justify="left" if column in ("name", "placement") else "right")
    for chosen in result.chosen:
        found = chosen.candidate
        table.add_row(chosen.name, str(chosen.budget), f"{found.score:.4f}", f"{found.cost:,.0f}", str(found.placement))
    out.print(table)


@app.command(cls=Command)
def quickstart(
    target: Annotated[Path, typer.Option("--out", help="The folder for the job. Run again, it goes on from there.")],
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A folder, a .gguf file, a hub name, or `tiny`. Default: SmolLM2-135M."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Text to learn from. Default: what every Python carries.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="A YAML recipe in place of the built-in one.")] = None,
) -> None:
    """Take a pretrained model the whole way: convert, distil, search, export, generate, and a report of it all."""
    from gearshift.quickstart import quickstart as run_quickstart

    out.print(f"report: {run_quickstart(target, model, text, recipe, overrides or [], err)}")


@app.command(cls=Command)
def export(
    model: Model,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    placement: OnePlacement = None,
    format: Annotated[str, typer.Option("--format", help="`auto`, `gearshift`, or a family such as `llama`.")] = "auto",
    merge_lora: Annotated[bool, typer.Option("--merge-lora", help="Merge LoRA adapters into the weights.")] = False,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="Write the LoRA adapters of all placements alone, as PEFT does.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write one placement of a model as a checkpoint of its own.

    MODEL may be the folder of a training run too, finished or not.
    """
    from gearshift.conversion import export as plan_export
    from gearshift.conversion import export_adapters
    from gearshift.progress import bar

    if adapters:
        if merge_lora or placement or format != "auto":
            raise ValueError("--adapters writes the adapters alone: leave out --merge-lora, --placement and --format")
        export_adapters(model, target, overwrite)
        out.print(f"{target}: the adapters alone, format peft")
        return
    conversion = plan_export(model, placement, format, merge_lora)
    with bar(err, f"writing {target}", conversion.bytes) as advance:
        conversion.write(target, overwrite, advance)
    why = f": {conversion.reason}" if conversion.reason else ""
    out.print(f"{target}: {conversion.bytes / 1e9:.3g} GB, format {conversion.format}{why}")


@app.command(cls=Command)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")],
    placement: OnePlacement = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most this many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="For temperatures above 0.")] = 0,
) -> None:
    """Continue a prompt under a placement."""
    import torch

    from gearshift.conversion import load
    from gearshift.generation import write

    loaded, tokenizer = load(model)
    chosen = loaded.placement(placement)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    written = write(loaded, tokenizer, prompt, chosen, max_new_tokens, **sampling)
    print(prompt + written.text)
    err.print(
        f"{written.tokens} tokens, {written.tokens_per_second:.1f} tokens/s, state {written.state_bytes / 1e6:.2f} MB,"
        f" placement {written.placement}",
        style="dim",
        highlight=False,
    )


def main() -> None:
    """The `gearshift` command."""
    sys.unraisablehook = interrupt_again
    app()


if __name__ == "__main__":
    main()
