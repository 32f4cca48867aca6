"""The admission hook: pods read their models from the node's cache (design D8).

review       an AdmissionReview as it comes -> the answer as it goes
admission    a pod and the world -> Mutation | Skip
asked        which models a pod names, and where they are to be
decisions    what may become of a pod, with the table of reasons
wrapper      the page of sh that a wrapped storage initializer runs
advice       what a pod is warned of
validation   what a cache may not say, and when it may go
volumes      which claims and volumes there must be, and the next step to that
world        what is known when a pod comes: caches, node groups, nodes
objects      Kubernetes objects -> what is in the world
scheduling   which nodes a pod, or a node group, allows
spec, patch  reading what may be absent; JSON Patches
"""
