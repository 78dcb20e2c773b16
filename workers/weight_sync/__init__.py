"""Weight updates: the actor's weights reach all engines, and each engine proves that it has them before it serves.

    driver         Team.sync_weights(v): all actor ranks run PolicyWorker.sync_weights(v)
    all ranks      sender.send_weights(): gathering is collective under ZeRO-3
    rank 0           client.start_weight_update()                  waits until no engine serves
                     for bucket in GatheredWeights:                gathers one layer at a time, takes checksums
                         client.update_weights(bucket)             waits until all engines have loaded it
                     client.finish_weight_update(v, checksums)     waits until all engines serve v; raises if one does not
    driver         RolloutWorker.prove(v, probe) on all engines: waits; then v is the run's policy version

1. Start: the engine serves no version. `generate` raises StaleWeights until an update has succeeded.
2. Buckets: the engine takes a checksum of each tensor as it arrives and loads it. `object_store` and `ipc` send a bucket per
   call; `nccl` makes one call, during which vLLM broadcasts all tensors.
3. Finish: the engine's checksums must equal the actor's, every layer must have got its weights, and no request may run. Then the
   engine drops its prefix cache and serves v. Otherwise it raises and still serves nothing.
4. Proof: the engine's log-probabilities of random tokens must be close to the actor's, which checksums alone do not show.
   Otherwise it raises DifferentModel and serves nothing.

After an error `Team.sync_weights` repeats the whole update: once after StaleWeights or DifferentModel, and after it has replaced
dead engines, unless the actor's ranks wait for one another (ZeRO-3). Other errors are raised.

Modules: gather (GatheredWeights, EngineClient), senders (make_sender), receivers (the engine's side, in vLLM's processes),
reloading and engine_fixes (corrections to vLLM), checksums, probe (Probe).
"""
