"""`kvdctl`: the operator's tool. One file per command; each only asks the daemon, or the router, and shows what came
back; `simulate` asks nobody.

Exit status of every command: 0 fine, 1 something is wrong, 2 wrong usage, 3 no daemon reachable, or no router.
"""

from typing import Annotated

import typer

from kvd import __version__
from kvd.ctl import doctor, evict, explain, ls, pins, quota, status, tiers, verify, workers
from kvd.ctl.moving import export, importing
from kvd.ctl.router import top, worker
from kvd.ctl.simulate.command import app as simulation

app = typer.Typer(
    name="kvdctl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help is text, wrapped to the terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kvdctl {__version__}")
        raise typer.Exit


@app.callback()
def kvdctl(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Look after kvd, the daemon that keeps the KV cache of this node's SGLang workers, and after kvd-router.

    Start with `kvdctl doctor`: it proves the whole path and says how to repair what is broken. `top`, `worker` and
    `explain REQUEST-ID` ask a router, anything else the daemon of this node.

    \b
    Exit status of every command:
      0  fine
      1  something is wrong: a red line, a damaged page, a request that kvd refused
      2  wrong usage
      3  no daemon (or no router) reachable: none there, or it does not answer
    """


for _name, _module in (
    ("status", status),
    ("doctor", doctor),
    ("tiers", tiers),
    ("workers", workers),
    ("ls", ls),
    ("verify", verify),
    ("explain", explain),
    ("top", top),
    ("evict", evict),
    ("export", export),
    ("import", importing),
):
    app.command(_name)(_module.command)
for _name, _command in (("pin", pins.pin), ("unpin", pins.unpin), ("pins", pins.pins), ("quota", quota.command)):
    app.command(_name)(_command)
app.add_typer(worker.app, name="worker")
app.add_typer(simulation, name="simulate")
