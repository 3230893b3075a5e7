"""The check that training and evaluation use the student that was verified, and no other."""

from __future__ import annotations

from minitron.runtime.plan import LoadedPlan
from minitron.specs.builds import VERIFICATION, read_document
from minitron.specs.errors import UsageError
from minitron.specs.file_hashes import first_difference

ANYWAY = "or add --unverified to take it as it is"


def require_verified(loaded: LoadedPlan) -> None:
    """Checks that the student of a plan is, byte for byte, the one whose verification passed. UsageError where it is
    not. A missing folder is reported later, when the model is loaded.
    """
    folder, build = loaded.folder / loaded.plan.student.model, loaded.folder
    if not folder.is_dir():
        return
    verification = read_document(build / VERIFICATION)
    if verification is None:
        raise UsageError(f"{build} has no {VERIFICATION}: the student was not verified; compile again, {ANYWAY}")
    if verification.get("passed") is not True:
        checks = [one for one in verification.get("checks") or () if isinstance(one, dict) and not one.get("passed")]
        which = f" in its check {checks[0].get('name')}" if checks else ""
        raise UsageError(f"the verification of {folder} failed{which}, see {VERIFICATION}; compile again, {ANYWAY}")
    hashes = verification.get("student")
    if not isinstance(hashes, dict) or not hashes:
        raise UsageError(f"{build / VERIFICATION} does not say which files were verified; compile again, {ANYWAY}")
    if (changed := first_difference(folder, hashes)) is not None:
        raise UsageError(f"{folder} is not the student that was verified: {changed}; compile again, {ANYWAY}")
