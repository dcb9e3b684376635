"""Start `deepspeed --hostfile`, and restart it after a failure with the hosts that still answer.

python scripts/supervise.py --hostfile hosts --min_nodes 2 \\
    scripts/train.py --deepspeed_config ds_configs/X.json

Options of the launcher come before the script, after `--`. Runs resume from their newest checkpoint by
themselves. A run that is done, was given bad input (exit code 2) or diverged (3) is not restarted. The
supervisor runs on a host that reaches the others by ssh; to end the run, end the supervisor. Hosts that are
back at the next failure are used again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

FINAL = {0: "is done", 2: "was given bad input", 3: "diverged"}
# Without these, ssh waits a quarter of an hour for a host that was cut off. ssh uses the first of two
# values, so PDSH_SSH_ARGS_APPEND can override them.
KEEP_ALIVE = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--hostfile", type=Path, required=True, help="file with one line `name slots=8` per host"
    )
    parser.add_argument("--min_nodes", type=int, default=1, help="give up if fewer hosts answer; default: 1")
    parser.add_argument(
        "--max_restarts", type=int, default=10, help="give up after this many restarts; default: 10"
    )
    parser.add_argument("--ssh_port", type=int, help="ssh port of all hosts; default: ssh's")
    parser.add_argument(
        "--answer_seconds", type=int, default=10, help="how long to wait for a host to answer; default: 10"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="[-- launcher options] script [arguments]")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    try:
        hosts = read_hosts(options.hostfile)
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    if not hosts or not command:
        parser.error("no host in the hostfile" if command else "no script to start")

    left = list(hosts)
    for restart in range(options.max_restarts + 1):
        started = time.monotonic()
        code = launch([hosts[name] for name in left], left[0], options.ssh_port, command)
        if code in FINAL:
            say(f"the run {FINAL[code]} (exit code {code})")
            return code
        silent = [name for name in hosts if name not in (answering := answer(hosts, options))]
        left = list(answering)
        ended = f"the run ended with exit code {code} after {time.monotonic() - started:.0f} s"
        found = f"{len(left)} of {len(hosts)} hosts answer" + (f", not {', '.join(silent)}" if silent else "")
        if len(left) < options.min_nodes:
            say(f"{ended}; {found}; giving up, as --min_nodes is {options.min_nodes}")
            return code
        if restart < options.max_restarts:
            say(f"{ended}; {found}; restart {restart + 1} of {options.max_restarts} on {', '.join(left)}")
    say(f"{ended}; giving up after {options.max_restarts} restarts")
    return code


def read_hosts(path: Path) -> dict[str, str]:
    """Return the lines of a hostfile by host name, in order."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return {line.split()[0]: line for line in lines if line}


def launch(lines: list[str], main_host: str, ssh_port: int | None, command: list[str]) -> int:
    """Run the launcher on the hosts of these lines until it ends; return its exit code.

    SIGINT and SIGTERM are passed to the launcher, which ends the ranks; then this process exits.
    """
    with tempfile.TemporaryDirectory() as folder:
        hostfile = Path(folder) / "hostfile"
        hostfile.write_text("\n".join(lines) + "\n")
        port = [] if ssh_port is None else ["--ssh_port", str(ssh_port)]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), *port]
        # force_multi: with one remaining host the launcher would start the ranks on this host instead.
        launcher += ["--force_multi", "--master_addr", main_host]
        arguments = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {KEEP_ALIVE}".strip()
        process = subprocess.Popen(
            [*launcher, *command], env={**os.environ, "PDSH_SSH_ARGS_APPEND": arguments}
        )

        def stop(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)
            process.wait()
            say(f"stopped by {signal.Signals(number).name}")
            sys.exit(128 + number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        return process.wait()


def answer(hosts: dict[str, str], options: argparse.Namespace) -> list[str]:
    """Return the hosts that answer to ssh, in order."""
    port = [] if options.ssh_port is None else ["-p", str(options.ssh_port)]
    quick = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={options.answer_seconds}"]

    def answers(host: str) -> bool:
        try:
            done = subprocess.run(
                ["ssh", *quick, *port, host, "true"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=options.answer_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    with ThreadPoolExecutor(max_workers=64) as threads:
        return [host for host, good in zip(hosts, threads.map(answers, hosts), strict=True) if good]


def say(message: str) -> None:
    print(f"supervise: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
