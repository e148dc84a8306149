"""Runs inside the sandbox: programs come in, what they print goes out. Trusts nothing it runs.

Started by `eval.sandbox` with its limits as arguments, it imports nothing of this project. A
program that breaks out of this file's rules (it shares the interpreter) is still inside the
namespaces, the filter and the limits; the process outside judges what comes out of the pipe.
"""

import ast
import io
import json
import os
import resource
import struct
import sys
import traceback


class Limited(io.TextIOBase):
    """Keeps the first characters that are written and counts the rest."""

    def __init__(self, limit):
        """Start empty."""
        self.parts, self.room, self.lost = [], limit, 0

    def writable(self):
        """Return True: it is a stream to write to."""
        return True

    def write(self, text):
        """Keep what there is room for."""
        text = str(text)
        kept = text[: self.room]
        self.parts.append(kept)
        self.room -= len(kept)
        self.lost += len(text) - len(kept)
        return len(text)

    def text(self):
        """Return what was kept, and a note of what was not."""
        note = f"\n[{self.lost} characters more]" if self.lost else ""
        return "".join(self.parts) + note


def run(code, names, limit):
    """Execute a program; return (outcome, output). A last expression is shown, as a shell does."""
    out = Limited(limit)
    sys.stdout = sys.stderr = out
    outcome = "ok"
    try:
        tree = ast.parse(code, "<program>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<program>", "exec"), names)  # noqa: S102 - this is what it is for
        if last is not None:
            expression = compile(ast.Expression(last.value), "<program>", "eval")
            value = eval(expression, names)  # noqa: S307 - in the sandbox, as above
            if value is not None:
                print(repr(value))
    except MemoryError:
        outcome = "memory"
        out.write("MemoryError")
    except SystemExit:
        pass
    except BaseException as error:
        outcome = "error"
        out.write("".join(traceback.format_exception_only(type(error), error)).strip())
    return outcome, out.text()


def main():
    """Serve programs from stdin until it ends."""
    memory, file_size, files, output, cpu = map(int, sys.argv[1:6])
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    source, sink = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    sys.stdin = open("/dev/null")  # noqa: SIM115 - stays open
    names = {"__name__": "__main__"}
    os.write(sink, b"ready\n")
    while header := source.read(4):
        request = source.read(struct.unpack(">I", header)[0]).decode("utf-8", "replace")
        outcome, text = run(request[16:], names, output)
        reply = json.dumps([request[:16], outcome, text]).encode()
        reply = struct.pack(">I", len(reply)) + reply
        while reply:
            reply = reply[os.write(sink, reply) :]


if __name__ == "__main__":
    main()
