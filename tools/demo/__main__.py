"""Real SGLang workers and kvd: the same long prompts, answered from every place the cache can be.

    python -m tools.demo [--nodes] [--keep] [--json]

Prints one table. Exits 1 when any output differs from the cold one, or an expected hit is missing.
"""

import argparse
import contextlib
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools.demo.node import LOGS, PAGE_TOKENS, Kvd, worker
from tools.demo.prompts import conversation, question
from tools.sglang_cpu.endpoint import Cached, Generation
from tools.sglang_cpu.server import SglangServer

NEW_TOKENS = 12
Ask = Callable[..., Generation]


@dataclass(frozen=True)
class Row:
    """One answer, compared with the cold one."""

    what: str
    prompt: str
    prompt_tokens: int
    ttft_s: float
    cached: Cached
    speed_up: float
    same_output: bool
    hit_as_expected: bool


class Demo:
    """Runs the steps and keeps the rows."""

    def __init__(self, console: Console) -> None:
        self.say = console
        self.rows: list[Row] = []
        self._cold: dict[str, Generation] = {}
        self._prompts: dict[str, Callable[[SglangServer], Ask]] = {}
        self._began = time.monotonic()

    def step(self, what: str) -> None:
        self.say.print(f"[dim]{time.monotonic() - self._began:5.0f} s[/]  {what}")

    def prepare(self, server: SglangServer) -> None:
        """Hold the conversation's first turn, and settle which two requests are measured."""
        server.chat([{"role": "user", "content": "Hello"}], 4)  # the first request of a process compiles things
        first, follow_up = conversation()
        answer = server.chat(first, 24)
        chat = [*first, {"role": "assistant", "content": answer.text}, {"role": "user", "content": follow_up}]
        text = question()

        def generate(target: SglangServer) -> Ask:
            return lambda **fields: target.generate(text=text, max_new_tokens=NEW_TOKENS, **fields)

        def converse(target: SglangServer) -> Ask:
            return lambda **fields: target.chat(chat, NEW_TOKENS, **fields)

        self._prompts = {"generate": generate, "chat, 2nd turn": converse}

    def measure(self, what: str, server: SglangServer, tier: str) -> None:
        """Send both requests; `tier` is where the prefix must come from, or "" for nowhere."""
        for name, make in self._prompts.items():
            ask = make(server)
            # A salt that nobody used makes a request cold without emptying anything.
            got = ask() if tier else ask(cache_salt=secrets.token_hex(8))
            if not tier:
                self._cold[name] = got
            cold = self._cold[name]
            pages = (got.prompt_tokens - 1) // PAGE_TOKENS * PAGE_TOKENS
            found = getattr(got.cached, tier) if tier else 0
            hit = found >= pages - PAGE_TOKENS if tier else got.cached.total == 0
            same = got.text == cold.text and got.output_ids == cold.output_ids
            self.rows.append(
                Row(what, name, got.prompt_tokens, got.ttft_s, got.cached, cold.ttft_s / got.ttft_s, same, hit)
            )

    def run(self, kvd: Kvd, a: SglangServer, b: SglangServer) -> None:
        self.step("starting kvd and two SGLang workers (about half a minute on two cores)")
        kvd.start()
        a.start()
        b.start()
        a.wait_ready()
        b.wait_ready()
        kvd.wait_for_workers(2)
        self.step("holding a conversation with worker A")
        self.prepare(a)
        b.chat([{"role": "user", "content": "Hello"}], 4)
        self.step("cold")
        self.measure("cold", a, "")
        for make in self._prompts.values():
            make(a)()
        self.step("again: worker A's own cache")
        self.measure("worker's own device cache", a, "device")
        self.step("flush_cache on worker A: now only kvd has the pages")
        a.flush_cache()
        self.measure("kvd: after /flush_cache", a, "storage")
        self.step("worker B, which never saw these prompts")
        self.measure("kvd: on the other worker", b, "storage")
        self.step("kill -9 worker A and start it again")
        a.kill()
        a.start()
        a.wait_ready()
        kvd.wait_for_workers(2)
        a.chat([{"role": "user", "content": "Hello"}], 4)
        self.measure("kvd: worker killed, restarted", a, "storage")
        self.step("kill -9 kvd and start it again")
        kvd.kill()
        kvd.start()
        kvd.wait_for_workers(2)
        a.flush_cache()
        self.measure("kvd: kvd killed -9, restarted", a, "storage")
        self.step("kill -9 kvd and take its memory away: only the disk has the pages")
        kvd.wait_until_written()
        kvd.kill(and_memory=True)
        kvd.start()
        kvd.wait_for_workers(2)
        kvd.wait_for_tiers()
        a.flush_cache()
        self.measure("kvd: memory lost, from NVMe", a, "storage")

    def run_nodes(self, kvd: Kvd, other: Kvd, a: SglangServer, b: SglangServer, c: SglangServer) -> None:
        """After `run`: the whole node restarts, and a second one starts that shares only a folder with it."""
        self.step("the whole node restarts, and a second node starts that shares only a folder with the first")
        for server in (a, b):
            server.kill()
        kvd.kill(and_memory=True)
        for node, server in ((kvd, a), (other, c)):
            node.start()
            server.start()
        for node, server in ((kvd, a), (other, c)):
            server.wait_ready()
            node.wait_for_workers(1)
            node.wait_for_tiers()
            server.chat([{"role": "user", "content": "Hello"}], 4)
        self.measure("kvd: node restarted, from NVMe", a, "storage")
        self.measure("kvd: on the second node, shared", c, "storage")

    @property
    def fine(self) -> bool:
        return bool(self.rows) and all(row.same_output and row.hit_as_expected for row in self.rows)

    def table(self) -> Table:
        table = Table(title="SmolLM2-135M on SGLang 0.5.23, on this machine's CPU", title_justify="left")
        for name in ("prefix from", "request"):
            table.add_column(name, no_wrap=True)
        for name in ("prompt", "TTFT", "device", "host", "kvd", "vs cold", "same output"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            hit = "" if row.hit_as_expected else " [red](hit missing)[/]"
            cached = (str(n or "") for n in (row.cached.device, row.cached.host, row.cached.storage))
            same = "yes" if row.same_output else "[red]NO[/]"
            speed = f"{row.speed_up:.1f}x" if row.what != "cold" else ""
            table.add_row(
                row.what + hit, row.prompt, str(row.prompt_tokens), f"{row.ttft_s:.2f} s", *cached, speed, same
            )
        return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave everything running at the end, and say what to try")
    parser.add_argument("--nodes", action="store_true", help="then restart the whole node, and start a second one")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, progress on stderr")
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json, highlight=False)
    if not console.is_terminal:
        console.width = 120
    demo = Demo(console)
    with contextlib.ExitStack() as stack:
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvd-demo-shared-")))
        kvd, other = Kvd(shared, "one"), Kvd(shared, "two")
        for node in (kvd, other):
            stack.callback(node.stop)
        a, b, c = worker("worker-a", kvd), worker("worker-b", kvd), worker("worker-c", other)
        for server in (a, b, c):
            stack.callback(server.stop)
        demo.run(kvd, a, b)
        if arguments.nodes:
            demo.run_nodes(kvd, other, a, b, c)
        if arguments.json:
            print(json.dumps([asdict(row) for row in demo.rows]))
        else:
            console.print(demo.table())
            console.print(
                "Cached tokens by where they came from; chat is /v1/chat/completions. On a CPU, attention is computed "
                "over cached tokens too: read kvd against the worker's own cache first, then against cold."
            )
        if not demo.fine:
            console.print(f"[red]An output differed or a hit is missing.[/] Logs: {LOGS}")
        if arguments.keep:
            _keep(console, kvd, a, c if arguments.nodes else b)
    return 0 if demo.fine else 1


def _keep(console: Console, kvd: Kvd, a: SglangServer, b: SglangServer) -> None:
    console.print(
        f"\nStill running. Try, in another terminal:\n"
        f"  export KVD_RUN_DIR={kvd.folder}\n"
        f"  .venvs/dev/bin/kvdctl status\n"
        f"  .venvs/dev/bin/kvdctl ls\n"
        f"  .venvs/dev/bin/kvdctl doctor\n"
        f"  curl -s http://127.0.0.1:{a.port}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "m", "max_tokens": 40, "messages": [{{"role": "user", "content": "Who are you?"}}]}}\'\n'
        f"The other worker listens on port {b.port}. Press Ctrl-C to end everything."
    )
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    sys.exit(main())
