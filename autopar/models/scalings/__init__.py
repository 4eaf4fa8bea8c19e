"""Stretched rotary positions: each file's ``make(frequencies, wave)`` returns frequencies and a factor on cos and sin."""
