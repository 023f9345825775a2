"""The maths of PPO: pure functions on `mx.array`, computed in float32 whatever the input dtype.

Shapes: B responses, T response slots, V vocabulary. `mask[b, t]` is True where a response token counts. Slots
outside the mask may hold anything, NaN and inf included: nothing of them reaches a result or a gradient.
"""
