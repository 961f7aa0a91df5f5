from autoprune.searching.fingerprint import differences


def test_equal_fingerprints_have_no_differences():
    made = {"space": "ab", "plugins": {"wanda": "1"}, "none": None, "empty": {}}
    assert differences(made, dict(made)) == []


def test_every_leaf_that_differs_is_named_with_both_values():
    then = {"space": "ab", "plugins": {"wanda": "1", "gptq": "2"}, "seed": None}
    now = {"space": "cd", "plugins": {"wanda": "1", "rtn": "1"}}
    assert differences(then, now) == [
        "plugins.gptq: '2' then, 'nothing' now",
        "seed: None then, 'nothing' now",
        "space: 'ab' then, 'cd' now",
        "plugins.rtn: 'nothing' then, '1' now",
    ]
