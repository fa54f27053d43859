"""The conformance suite: checks by clause of the contract, for any mixer by name or definition.

    from sequence_mixer.conformance import check_mixer
    check_mixer("ssd").raise_on_failure()

Under pytest:

    @parametrize_with_mixer_checks(["ssd"])
    def test_conformance(check):
        check()
"""

from sequence_mixer.conformance.catalogue import Check, CheckFailed, CheckSkipped, all_checks
from sequence_mixer.conformance.parametrize import parametrize_with_mixer_checks
from sequence_mixer.conformance.probes import Subject
from sequence_mixer.conformance.report import Report, Result
from sequence_mixer.conformance.suite import check_mixer

__all__ = [
    "Check",
    "CheckFailed",
    "CheckSkipped",
    "Report",
    "Result",
    "Subject",
    "all_checks",
    "check_mixer",
    "parametrize_with_mixer_checks",
]
