"""Head metrics and head reweighting. Every module here whose name has no leading underscore is one method.

Its name is the method's name; it defines ``METHOD``, the frozen dataclass that carries the options.
"""
