"""Writes the report as a comment on the pull request, or over the one that an earlier run wrote: `python -P comment.py`.

    REPORT              the file
    CHANGED             how many specs differ; with 0 only an earlier comment is written over
    AUTHOR              whose comments are written over: the account that the token belongs to
    PULL_REQUEST        its number
    GITHUB_REPOSITORY   owner/name
    GH_TOKEN            for `gh`

A pull request from a fork may not write comments: that is a warning, the report is in the job's summary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# What GitHub takes in one comment is 65,536 characters; the end of a longer report is left to the summary.
LIMIT = 60_000
MARKER = "<!-- minitron specs -->"
# The three values that are needed of each comment, one JSON object a line.
FIELDS = ".[] | {id, body, author: .user.login}"


def main() -> int:
    """Writes the comment and returns the exit code, which is 0 also where GitHub refuses it."""
    report = Path(os.environ.get("REPORT", ""))
    if not report.is_file():
        print("There is no report.")
        return 0
    text = report.read_text(encoding="utf-8")
    if len(text) > LIMIT:
        # Only whole lines stay, so that no escape is cut in half.
        kept = text[:LIMIT].rpartition("\n")[0]
        text = f"{kept}\n\n</details>\n\nThe report is longer than a comment can be: the rest is in the summary of the job.\n"
    body = report.with_suffix(".comment")
    body.write_text(text, encoding="utf-8")

    repository = f"repos/{os.environ['GITHUB_REPOSITORY']}"
    comments = f"{repository}/issues/{os.environ['PULL_REQUEST']}/comments"
    found = gh("--paginate", comments, "--jq", FIELDS)
    if found is None:
        return warn("The comments of the pull request cannot be read; the report is in the summary of the job.")
    ours = [one["id"] for line in found.split("\n") if line and is_ours(one := json.loads(line))]
    written = ["-F", f"body=@{body}"]
    if ours and gh("--silent", "--method", "PATCH", f"{repository}/issues/comments/{ours[0]}", *written) is not None:
        return 0
    if os.environ.get("CHANGED", "1") == "0" or gh("--silent", "--method", "POST", comments, *written) is not None:
        return 0
    return warn(
        "The report cannot be written as a comment (a pull request from a fork?); it is in the summary of the job."
    )


def is_ours(comment: dict[str, object]) -> bool:
    """Checks whether an earlier run wrote a comment: anybody can begin one with the marker."""
    return comment["author"] == os.environ["AUTHOR"] and str(comment["body"]).startswith(MARKER)


def gh(*arguments: str) -> str | None:
    """Returns GitHub's answer; None where it refuses."""
    done = subprocess.run(["gh", "api", *arguments], stdout=subprocess.PIPE, text=True)
    return done.stdout if done.returncode == 0 else None


def warn(reason: str) -> int:
    """An annotation of the run."""
    print(f"::warning::{reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
