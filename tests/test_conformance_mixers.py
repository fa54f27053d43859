"""Every registered mixer passes the conformance suite, whatever the registry holds."""

from zoo.registry import registry

from sequence_mixer.conformance import parametrize_with_mixer_checks


@parametrize_with_mixer_checks(registry.names())
def test_conformance(check) -> None:  # type: ignore[no-untyped-def]
    check()


def test_the_registry_holds_mixers() -> None:
    assert registry.names()
