"""A game that two learners play: their loss says little of how well they do.

The cart and its pole as in Barto, Sutton and Anderson, *Neuronlike adaptive elements that
can solve difficult learning control problems*, 1983, with the constants in common use.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import cos, sin
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam, Optimizer

from bench.scenarios.varied import Varied, perceptron
from bench.scenarios.workloads import Batch

State = npt.NDArray[np.float64]

GRAVITY, CART, POLE, HALF_LENGTH, FORCE, TICK_S = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
FARTHEST, STEEPEST = 2.4, 0.2095
LONGEST = 200
"""Moves of a game at most."""


class CartPole:
    """A pole on a cart that is pushed left (0) or right (1) at every move."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(int(torch.randint(1 << 31, ())))
        self.state = self.restart()

    def restart(self) -> State:
        """A new game; returns its first state: place, speed, angle and its speed."""
        self._moves = 0
        self.state = self.random.uniform(-0.05, 0.05, 4)
        return self.state

    def move(self, right: int) -> tuple[State, bool, bool]:
        """The state after a push, whether the game is lost, and whether it is over."""
        place, speed, angle, turning = self.state.tolist()
        push = FORCE if right else -FORCE
        total = CART + POLE
        pull = (push + POLE * HALF_LENGTH * turning**2 * sin(angle)) / total
        swing = (GRAVITY * sin(angle) - cos(angle) * pull) / (
            HALF_LENGTH * (4 / 3 - POLE * cos(angle) ** 2 / total)
        )
        shift = pull - POLE * HALF_LENGTH * swing * cos(angle) / total
        self.state = np.array(
            [
                place + TICK_S * speed,
                speed + TICK_S * shift,
                angle + TICK_S * turning,
                turning + TICK_S * swing,
            ]
        )
        self._moves += 1
        lost = abs(self.state[0]) > FARTHEST or abs(self.state[2]) > STEEPEST
        return self.state, lost, lost or self._moves >= LONGEST


class Quick:
    """A perceptron of two layers as numpy computes it, for one state at a time."""

    def __init__(self, model: nn.Sequential) -> None:
        first, _, last = model
        self._layers = [
            (
                cast(Tensor, each.weight).detach().numpy(),
                cast(Tensor, each.bias).detach().numpy(),
            )
            for each in (first, last)
        ]

    def __call__(self, state: State) -> npt.NDArray[np.float32]:
        """What the network gives for a state."""
        (wide, bias), (narrow, last_bias) = self._layers
        with np.errstate(all="ignore"):
            hidden = np.tanh(wide @ state.astype(np.float32) + bias)
            return cast(npt.NDArray[np.float32], narrow @ hidden + last_bias)


class Playing(Varied):
    """What plays the game by a network while it trains it."""

    watched = False
    model: nn.Sequential

    def play(self) -> None:
        """Set up the game, and count nothing yet."""
        self.game = CartPole()

    def evaluate(self) -> float:
        """The longest game over the mean length of ten, in which the best move is made."""
        game, player = CartPole(), Quick(self.model)
        moves = 0
        for _ in range(10):
            state, over = game.restart(), False
            while not over:
                state, _, over = game.move(int(np.argmax(player(state)[:2])))
                moves += 1
        return 10 * LONGEST / moves

    def corrupted(self, batch: Batch) -> Batch:
        """States are in another order of their numbers than they were."""
        return batch[0].flip(1), batch[1]


class Policy(Playing):
    """An actor-critic: an update after so many moves, or after each game.

    Advantages are what was won over what the critic had expected, the returns discounted.
    The loss is negative at times, and moves for reasons of the game.
    """

    discount = 0.98

    def __init__(self, variant: int) -> None:
        self.play()
        self.batch_size = (32, 1, 64)[variant]
        self._by_game = variant == 1
        self.clip = (0.0, 0.0, 0.5)[variant]
        self.model = perceptron(4, (32, 48, 64)[variant], 3, activation=nn.Tanh)
        self.optimizer: Optimizer = Adam(
            self.model.parameters(), lr=(5e-3, 1e-2, 3e-3)[variant]
        )

    def loader(self, batch_size: int) -> Iterable[Batch]:
        """States, and for each of them the move and the discounted return, without end."""
        state = self.game.restart()
        while True:
            player = Quick(self.model)
            states: list[State] = []
            moves: list[int] = []
            rewards: list[tuple[float, bool, float]] = []
            over = False
            while not over if self._by_game else len(states) < batch_size:
                logits = player(state)
                with np.errstate(all="ignore"):
                    right = int(
                        self.game.random.random() < 1 / (1 + np.exp(logits[0] - logits[1]))
                    )
                states.append(state)
                moves.append(right)
                state, lost, over = self.game.move(right)
                rewards.append((1.0, over, 0.0 if lost else float(player(state)[2])))
                if over:
                    state = self.game.restart()
            yield _batch(
                states, moves, _returns(rewards, self.discount, float(player(state)[2]))
            )

    def loss(self, batch: Batch) -> Tensor:
        """Of the actor, of the critic, and a reward for being undecided."""
        output = self.model(batch[0])
        moves, returns = batch[1][:, 0].long(), batch[1][:, 1] / 10
        logs = functional.log_softmax(output[:, :2], 1)
        advantage = returns - output[:, 2] / 10
        actor = -(logs.gather(1, moves[:, None]).squeeze(1) * advantage.detach()).mean()
        entropy = -(logs.exp() * logs).sum(1).mean()
        return torch.as_tensor(actor + 0.5 * advantage.square().mean() - 0.01 * entropy)


def _returns(
    rewards: list[tuple[float, bool, float]], discount: float, expected: float
) -> list[float]:
    """Discounted returns of moves; after the last and after a game's end as the critic says."""
    found = []
    for reward, over, after in reversed(rewards):
        expected = reward + discount * (after if over else expected)
        found.append(expected)
    return found[::-1]


def _batch(states: list[State], moves: list[int], numbers: list[float]) -> Batch:
    return (
        torch.tensor(np.array(states), dtype=torch.float32),
        torch.tensor([moves, numbers], dtype=torch.float32).T,
    )


class Dqn(Playing):
    """Deep Q-learning with a memory of moves and a target that follows now and then.

    Its loss rises as returns do, and jumps where the target is renewed (Mnih and others,
    *Human-level control through deep reinforcement learning*, 2015).
    """

    discount = 0.98
    remembered = 4000

    def __init__(self, variant: int) -> None:
        self.play()
        self.batch_size = (32, 64, 32)[variant]
        self._renewed = (50, 100, 200)[variant]
        self._huber = variant == 2
        self.model = perceptron(4, 64, 2, activation=nn.Tanh)
        self._target = perceptron(4, 64, 2, activation=nn.Tanh)
        self._target.load_state_dict(self.model.state_dict())
        self.optimizer: Optimizer = Adam(
            self.model.parameters(), lr=(1e-3, 2e-3, 5e-4)[variant]
        )
        self._memory = torch.zeros(self.remembered, 11)
        self._moves = 0

    def loader(self, batch_size: int) -> Iterable[Batch]:
        """States, and for each of them move, reward, end and next state, without end."""
        state = self.game.restart()
        while True:
            # Two moves for each update; before the first one there are some to draw from.
            for _ in range(2 if self._moves else 200):
                state = self._move(state)
            drawn = torch.randint(min(self._moves, self.remembered), (batch_size,))
            if self._moves // 2 % self._renewed == 0:
                self._target.load_state_dict(self.model.state_dict())
            rows = self._memory[drawn]
            yield rows[:, :4], rows[:, 4:]

    def loss(self, batch: Batch) -> Tensor:
        """Mean square error, or Huber's, of what moves are worth."""
        told = batch[1]
        worth = self.model(batch[0]).gather(1, told[:, :1].long()).squeeze(1)
        with torch.no_grad():
            best = self._target(told[:, 3:]).max(1).values
            wanted = told[:, 1] + self.discount * (1 - told[:, 2]) * best
        if self._huber:
            return functional.smooth_l1_loss(worth, wanted)
        return functional.mse_loss(worth, wanted)

    def _move(self, state: State) -> State:
        explores = max(0.05, 1 - self._moves / 1000)
        random = self.game.random
        if random.random() < explores:
            right = int(random.integers(2))
        else:
            right = int(np.argmax(Quick(self.model)(state)))
        after, lost, over = self.game.move(right)
        row = [*state, right, 1.0, float(lost), *after]
        self._memory[self._moves % self.remembered] = torch.tensor(row)
        self._moves += 1
        return self.game.restart() if over else after
