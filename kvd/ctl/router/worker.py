"""`kvdctl worker`: the workers of a router: who they are, and that they come and go."""

from typing import Annotated, Final

import typer

from kvd.ctl.router import summed
from kvd.ctl.router.figures import ABSENT, missing
from kvd.ctl.router.link import DEFAULT_URL, KeyFileOption, RouterOption, router_at
from kvd.ctl.terminal import JsonOption, printable, reporting, show_json, show_table
from kvd.router.pages import replies

_COLUMNS: Final = ("worker", "state", "model", "node", "running", "queued", "credit", "what is missing")

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Url = Annotated[
    str, typer.Argument(metavar="URL", help="The SGLang server, as the router knows it: http://HOST:PORT.")
]


@app.callback()
def worker() -> None:
    """Show and change which workers a router sends requests to.

    What is changed here lasts until the router is started again; what it starts with is `workers` in its settings.
    Not to be confused with `kvdctl workers`, which lists the ranks that are attached to this node's kvd.

    \b
    Examples:
      kvdctl worker list
      kvdctl worker drain http://10.0.0.2:30000

    \b
    Exit status of each: 0 done, 1 the router refused, 2 wrong usage, 3 no router reachable.
    """


@app.command("list")
def list_workers(
    router: RouterOption = DEFAULT_URL, key_file: KeyFileOption = None, as_json: JsonOption = False
) -> None:
    """Show the router's workers.

    "credit" is whether requests are sent there for what it has cached; where not, "what is missing" says why, and
    what to do about it.

    \b
    Examples:
      kvdctl worker list
      kvdctl worker list --json | jq '.workers[] | select(.state != "serving")'

    \b
    Exit status: 0 the router answered, 1 it refused, 2 wrong usage, 3 no router reachable.
    """
    with reporting(as_json):
        said = summed.workers(router_at(router, key_file).ask_all("/kvd/workers", replies.Workers))
        if as_json:
            show_json(said)
        elif said.workers:
            show_table(_COLUMNS, [_row(one) for one in said.workers])
        else:
            print("No worker is there: kvdctl worker add URL")


@app.command("add")
def add(
    url: Url, router: RouterOption = DEFAULT_URL, key_file: KeyFileOption = None, as_json: JsonOption = False
) -> None:
    """Have the router send requests to one more worker.

    It gets requests as soon as it answers, and is chosen for what it has cached once the router has seen that both
    make the same tokens of a prompt: kvdctl worker list shows how far it is.

    \b
    Examples:
      kvdctl worker add http://10.0.0.3:30000

    \b
    Exit status: 0 done, 1 the router refused, 2 wrong usage, 3 no router reachable.
    """
    _change("add", url, router, key_file, as_json, "joins")


@app.command("drain")
def drain(
    url: Url, router: RouterOption = DEFAULT_URL, key_file: KeyFileOption = None, as_json: JsonOption = False
) -> None:
    """Have a worker finish what it has, and get nothing new.

    It leaves when its last stream has ended. Follow it with kvdctl worker list.

    \b
    Examples:
      kvdctl worker drain http://10.0.0.2:30000

    \b
    Exit status: 0 done, 1 the router refused, 2 wrong usage, 3 no router reachable.
    """
    _change("drain", url, router, key_file, as_json, "gets nothing new, and leaves when it has nothing left")


@app.command("remove")
def remove(
    url: Url, router: RouterOption = DEFAULT_URL, key_file: KeyFileOption = None, as_json: JsonOption = False
) -> None:
    """Have a worker leave at once.

    For one that is dead or must stop now. kvdctl worker drain lets it finish first.

    \b
    Examples:
      kvdctl worker remove http://10.0.0.2:30000

    \b
    Exit status: 0 done, 1 the router refused, 2 wrong usage, 3 no router reachable.
    """
    _change("remove", url, router, key_file, as_json, "is gone")


def _change(what: str, url: str, router: str, key_file: KeyFileOption, as_json: bool, done: str) -> None:
    url = url if "://" in url else f"http://{url}"  # as --router may be written
    with reporting(as_json):
        router_at(router, key_file).change(what, url)
        if as_json:
            show_json({"worker": url, "done": what})
        else:
            print(printable(f"{url} {done}."))


def _row(one: replies.Worker) -> tuple[object, ...]:
    credit, what = "yes" if one.credit else "no", missing(one) or ABSENT
    remedy = f" -> {one.remedy}" if one.remedy and not one.health else ""  # it is for `why`
    return one.name, one.state, one.model or "?", one.node or ABSENT, one.running, one.queued, credit, what + remedy
