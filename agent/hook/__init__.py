"""The admission hook: pods read their models from the node's cache (design D8).

scheduling   which nodes a pod, or a node group, allows
wrapper      the page of sh that a wrapped storage initializer runs
decisions    what may become of a pod, with the table of reasons
admission    pod + caches + groups + claims -> Mutation | Skip
"""
