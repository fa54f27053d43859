"""Every registered mixer passes the conformance suite, whatever the registry holds.

On a CPU in float32; `ZOO_TEST_DEVICE=cuda ZOO_TEST_DTYPES=float32,bfloat16` runs it elsewhere (`make gpu-test` does).
"""

import os

from zoo.registry import registry

from sequence_mixer.conformance import parametrize_with_mixer_checks

DEVICE = os.environ.get("ZOO_TEST_DEVICE", "cpu")
DTYPES = os.environ.get("ZOO_TEST_DTYPES", "float32").split(",")


@parametrize_with_mixer_checks(registry.names(), device=DEVICE, dtypes=DTYPES)
def test_conformance(check) -> None:  # type: ignore[no-untyped-def]
    check()


def test_the_registry_holds_mixers() -> None:
    assert registry.names()
