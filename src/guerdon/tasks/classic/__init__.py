"""The classic control problems as families of vector environments: array operations step all of them at once."""

from guerdon.tasks.classic.acrobot import Acrobot
from guerdon.tasks.classic.base import Classic
from guerdon.tasks.classic.cartpole import CartPole
from guerdon.tasks.classic.mountain_car import MountainCar, MountainCarContinuous
from guerdon.tasks.classic.pendulum import Pendulum

__all__ = ["Acrobot", "CartPole", "Classic", "MountainCar", "MountainCarContinuous", "Pendulum"]
