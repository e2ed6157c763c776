"""wip"""
from jpeft.core import consume, structure, views  # noqa
from jpeft.core.roles import inspect
from jpeft.core.interpret import register_rule
from jpeft.core.consume import multiply
from jpeft.core.match import layers
from jpeft.core.method import Call, Identity, Method
from jpeft.core.plan import Plan
from jpeft.core.planning import plan
from jpeft.core.store import save, load
from jpeft.core.partition import mask, partition, combine
from jpeft import optim
from jpeft.core.tokens import Tokens
from jpeft.core.transform import adapt, base, init, merge, merge_error, penalty
from jpeft.core.frozen import Frozen
from jpeft.methods import *
