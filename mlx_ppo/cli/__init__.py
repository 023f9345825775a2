"""The command line: parse, call one function, print. Heavy imports live inside the commands."""

PROGRAM = "program"  # the context's object where the process is the command's own, which a library's call isn't
