"""Rewards that the command-line tests register by name."""

from __future__ import annotations

from visearch.rewards.function import FunctionReward

calls: list[int] = []


def brightness(device="cpu") -> FunctionReward:
    return FunctionReward(lambda images, prompts: [sum(i.convert("L").tobytes()) / 255 for i in images], "brightness")


def darkness(device="cpu") -> FunctionReward:
    return FunctionReward(lambda images, prompts: [-sum(i.convert("L").tobytes()) / 255 for i in images], "darkness")


def nan(device="cpu") -> FunctionReward:
    return FunctionReward(lambda images, prompts: [float("nan")] * len(images), "nan")


def raising(device="cpu") -> FunctionReward:
    def fail(images, prompts):
        raise ZeroDivisionError("the reward's own fault")

    return FunctionReward(fail, "raising")


def short(device="cpu") -> FunctionReward:
    return FunctionReward(lambda images, prompts: [0.0] * (len(images) - 1), "short")


def interrupting(device="cpu") -> FunctionReward:
    """Ctrl-C in the second round."""
    calls.clear()

    def score(images, prompts):
        calls.append(len(images))
        if len(calls) > 3:
            raise KeyboardInterrupt
        return [sum(i.convert("L").tobytes()) / 255 for i in images]

    return FunctionReward(score, "interrupting")
