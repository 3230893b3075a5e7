"""The command line: reads arguments, calls the compiler and the runtime, prints the results. It holds no logic of its
own.
"""
