"""What compiled programs send, read from their text."""

import pytest

from attnlab.bench import Collective, collectives

TEXT = """\
HloModule step

%body.1 (p: f32[2]) -> f32[2] {
  %sum = bf16[4,8]{1,0:T(8,128)(2,1)} all-reduce(%x), channel_id=1, to_apply=%add
}

%called (p: f32[2]) -> f32[2] {
  %parts = (f32[2,3]{1,0}, pred[5]{0}) all-to-all(%a, %b), channel_id=2
}

ENTRY %main.5 (q: f32[2]) -> f32[2] {
  %sent = (f32[7]{0}, f32[7]{0}, u32[], u32[]) collective-permute-start(%q)
  %all = (f32[3]{0}, f32[12]{0}) all-gather-start(%q), dimensions={0}
  %w = (s32[], f32[2]) while(%t), body=%body.1, backend_config={TRIPS}
  %c = f32[2]{0} fusion(%w), kind=kLoop, calls=%called
}
"""


class Compiled:
    def __init__(self, trips):
        self.trips = trips

    def as_text(self):
        return TEXT.replace("TRIPS", self.trips)


def test_collectives_are_read():
    found = collectives(Compiled('{"known_trip_count":{"n":"6"}}'))
    assert found == [
        Collective("collective-permute", 28, 1, True),
        Collective("all-gather", 48, 1, True),
        Collective("all-reduce", 64, 6, False),
        Collective("all-to-all", 29, 1, False),
    ]
    assert [x.received(4) for x in found] == [28, 36, 6 * 64 * 1.5, 29 * 0.75]


def test_a_loop_of_unknown_length():
    with pytest.raises(ValueError, match=r"main.5 sends in a loop of unknown length"):
        collectives(Compiled("{}"))


def test_what_is_no_program():
    with pytest.raises(TypeError, match=r"compiled: expected what .* got str"):
        collectives(TEXT)
