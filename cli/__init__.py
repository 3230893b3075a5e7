"""The command line: reads arguments, calls the compiler and the runtime, says what came of it. No logic of its own."""
