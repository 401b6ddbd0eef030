"""An optimizer's state follows the weights: its moments are further outputs of the same plan, and its parameters get the target's order.

What an elementwise optimizer keeps for an element of a parameter belongs to that element, wherever a plan moves it. So for every output the
parameter's expression is taken with the moment in the parameter's place. Steps that do more than move elements stop it, by name.
"""
