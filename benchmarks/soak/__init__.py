"""A long run that is watched from outside: does anything of it grow, or slow down?"""
