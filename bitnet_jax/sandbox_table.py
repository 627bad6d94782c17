"""The sandbox's checks as a table for a person."""

from rich.table import Table

# Every measured figure in words, with the format of its value.
LABELS = {
    "dtype": ("stored as", "{}"),
    "codes": ("codes found", "{}"),
    "minus_share": ("share of -1", "{:.2%}"),
    "zero_share": ("share of 0 (5 to 7 %)", "{:.2%}"),
    "plus_share": ("share of +1", "{:.2%}"),
    "imbalance": ("difference of -1 and +1 (under 1 %)", "{:.2%}"),
    "zero_share_expected": ("share of 0 the distribution gives", "{:.2%}"),
    "linear_layers": ("linear layers", "{}"),
    "replaced": ("made ternary", "{}"),
    "float_matrices_left": ("float matrices left", "{}"),
    "forward_works": ("forward pass works", "{}"),
    "ratio_seed_formula": ("ratio by the seed's formula, 8 bits a weight", "{:.2f}x"),
    "ratio_arrays": ("ratio of the arrays, 2 bits a weight", "{:.2f}x"),
    "ratio_on_disk": ("ratio on disk, everything counted", "{:.2f}x"),
    "disk_bytes_float32": ("bytes of the float32 checkpoint folder", "{:,}"),
    "disk_bytes_packed": ("bytes of the packed checkpoint folder", "{:,}"),
    "reloaded_is_equal": ("read back, same output to the bit", "{}"),
    "output_shape": ("output shape", "{}"),
    "finite": ("no NaN, no infinity", "{}"),
    "finite_at_extremes": ("nor for inputs times 0, 1e-6 and 1e6", "{}"),
    "gradients": ("gradients (3 kernels, 3 biases)", "{}"),
    "finite_gradients": ("finite", "{}"),
    "nonzero_gradients": ("not zero", "{}"),
    "gradient_norm": ("norm of all", "{:.3f}"),
    "gradient_norm_float": ("norm in full precision", "{:.3f}"),
    "ste_error": ("relative distance from the official STE", "{:.1e}"),
    "quantised_weights": ("weights made ternary", "{:,}"),
}


def _format(figures: dict, key: str) -> str:
    if key not in figures:
        return ""
    value = figures[key]
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return LABELS[key][1].format(value)


def table(result: dict) -> Table:
    """The result of `sandbox.run` for a person: PASS or FAIL, and each figure beside the seed's."""
    out = Table(title="The Phase 4 seed's six checks", title_justify="left")
    out.add_column("check")
    for name in ("here", "seed"):
        out.add_column(name, justify="right", no_wrap=True)
    for name, check in result["checks"].items():
        verdict = "[green]PASS[/]" if check["passed"] else "[bold red]FAIL[/]"
        out.add_row(f"{verdict}  [bold]{name.replace('_', ' ')}[/]")
        for key in check["measured"]:
            ours, seed = (_format(check[x], key) for x in ("measured", "seed"))
            out.add_row("      " + LABELS[key][0], ours, seed)
        out.add_section()
    return out
