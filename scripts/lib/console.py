#!/usr/bin/env python3
"""console.py - reads a guest's console until it shows what is waited for.

Used by: libvirt-boot only.
Promises: every byte that came is in --log. Prints the seconds it took and exits
with 0 when the pattern came, with 1 when --limit seconds passed or the terminal
went away before.
"""

import argparse
import os
import re
import select
import sys
import termios
import time
import tty


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--terminal", required=True, help="the console, as virsh ttyconsole says")
    parser.add_argument("--log", required=True)
    parser.add_argument("--until", required=True, help="a regular expression")
    parser.add_argument("--limit", type=float, required=True)
    options = parser.parse_args()

    until = re.compile(options.until.encode())
    start = time.monotonic()
    seen = b""
    terminal = os.open(options.terminal, os.O_RDWR | os.O_NOCTTY)
    # What the guest says must not come back to it as if it had been typed.
    tty.setraw(terminal, termios.TCSANOW)
    with open(options.log, "wb", buffering=0) as log:
        while (left := start + options.limit - time.monotonic()) > 0:
            if not select.select([terminal], [], [], left)[0]:
                break
            try:
                data = os.read(terminal, 65536)
            except OSError:
                break
            if not data:
                break
            log.write(data)
            seen = (seen + data)[-65536:]
            if until.search(seen):
                print(f"{time.monotonic() - start:.1f}")
                return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
