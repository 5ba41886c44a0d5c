"""What `opreg bench` compares with: the same work as others do it, on the same inputs. No operator uses any of this.

Each function takes the operator's arguments as one mapping, prepares what can be prepared once, and returns a call
without arguments, or the reason why this machine or these inputs are not for it.
"""
