#!/usr/bin/env python3
"""boot.py - runs a QEMU whose serial console is its standard output, and times
how long the guest takes to say that it is up.

Used by: boot.sh only.
Promises: the command has ended when this ends: by itself, or killed when the
guest was not up after --limit seconds, did not power off within a minute after
that, or this process was told to stop. --result then holds JSON: up, seconds
(start of the command to the marker), guest-uptime, wall-seconds, cpu-seconds,
exit, reason (why it failed, empty otherwise). Exit code 0 means up and powered
off by itself.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time

POWER_OFF_SECONDS = 60


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", required=True, help="the serial console, each byte as it came")
    parser.add_argument("--stderr", required=True, help="what the command says itself")
    parser.add_argument("--result", required=True)
    parser.add_argument("--marker", required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()

    def stop(number, _frame):
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)

    marker = options.marker.encode()
    seconds = None
    uptime = None
    reason = ""
    recent = b""
    start = time.monotonic()
    deadline = start + options.limit
    with open(options.log, "wb") as log, open(options.stderr, "wb") as stderr:
        child = subprocess.Popen(
            # The child must not outlive this process, even after kill -9.
            ["setpriv", "--pdeathsig", "KILL", "--", *options.command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        try:
            console = child.stdout.fileno()
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    reason = (
                        f"the guest did not come up within {options.limit:g} s"
                        if seconds is None
                        else f"the guest came up but did not power off within {POWER_OFF_SECONDS} s"
                    )
                    break
                if not select.select([console], [], [], left)[0]:
                    continue
                data = os.read(console, 65536)
                now = time.monotonic()
                if not data:
                    break
                log.write(data)
                log.flush()
                if seconds is None:
                    recent += data
                    at = recent.find(marker)
                    # The whole line, so that the uptime is complete.
                    if at >= 0 and b"\n" in recent[at:]:
                        seconds = now - start
                        deadline = now + POWER_OFF_SECONDS
                        words = recent[at + len(marker) :].split()
                        uptime = float(words[0]) if words else None
                    elif at < 0:
                        recent = recent[-len(marker) :]
        finally:
            if reason or sys.exc_info()[0]:
                child.kill()
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)

    if not reason and seconds is None:
        reason = f"QEMU ended (exit code {child.returncode}) before the guest was up"
    elif not reason and child.returncode != 0:
        reason = f"QEMU ended with exit code {child.returncode} after the guest was up"
    with open(options.result, "w", encoding="utf-8") as out:
        json.dump(
            {
                "up": seconds is not None,
                "seconds": None if seconds is None else round(seconds, 3),
                "guest-uptime": uptime,
                "wall-seconds": round(time.monotonic() - start, 3),
                "cpu-seconds": round(usage.ru_utime + usage.ru_stime, 3),
                "exit": child.returncode,
                "reason": reason,
            },
            out,
            indent=2,
        )
        out.write("\n")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
