package podnet

import (
	"context"
	"encoding/json"
	"path/filepath"
	"sync"
	"time"

	"github.com/containernetworking/cni/libcni"
)

const (
	// deferredMaxAge limits how long a DEL waits for an uninstalled plugin, for example during an
	// upgrade.
	deferredMaxAge = 24 * time.Hour
	// deferredInterval is the interval of checks for reinstalled plugins.
	deferredInterval = 5 * time.Second
	// deferredRetryInterval is the interval between failing DELs.
	deferredRetryInterval = 10 * time.Minute
)

// deferred stores the attachments of removed pods until their uninstalled plugins can run DEL. It
// uses the format of libcni's cache, in a directory of its own.
type deferred struct {
	cache *cache

	mu   sync.Mutex // guards next
	next map[string]time.Time
}

func newDeferred(cacheDir string) *deferred {
	return &deferred{
		cache: newCache(filepath.Join(cacheDir, "owed"), nil),
		next:  map[string]time.Time{},
	}
}

// add stores an attachment.
func (d *deferred) add(c attachment) error { return d.cache.restore(c) }

// isDue reports whether a DEL may be retried now, and schedules the next one.
func (d *deferred) isDue(name string, now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now.Before(d.next[name]) {
		return false
	}
	d.next[name] = now.Add(deferredRetryInterval)
	return true
}

func (d *deferred) forget(name string) {
	d.cache.remove(name)
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.next, name)
}

// run retries deferred DELs until ctx ends.
func (a *attacher) run(ctx context.Context) {
	tick := time.NewTicker(deferredInterval)
	defer tick.Stop()

	for {
		a.retryDeferred(ctx, time.Now())
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// retryDeferred runs the deferred DELs with all plugins installed, and drops those older than
// deferredMaxAge.
func (a *attacher) retryDeferred(ctx context.Context, now time.Time) {
	entries, err := a.deferred.cache.entries("")
	if err != nil {
		a.log.Debug("cannot read the deferred DELs of CNI plugins", "err", err)
		return
	}

	for _, e := range entries {
		name := e.Network + "-" + e.ContainerID + "-" + e.IfName
		switch rest := e.installed(a.binDirs); {
		case now.Sub(e.written) > deferredMaxAge:
			a.log.Warn("CNI plugins were not reinstalled; giving up on their resources of a removed pod",
				"plugins", rest.missing, "sandbox", e.ContainerID, "network", e.Network)
			a.deferred.forget(name)
		case e.list == nil || len(rest.missing) > 0 || rest.address != "" || !a.deferred.isDue(name, now):
		default:
			a.retryOne(ctx, e, name)
		}
	}
}

// retryOne runs one DEL. libcni drops an entry without a result before it runs the plugins.
func (a *attacher) retryOne(ctx context.Context, e *entry, name string) {
	rt := e.runtime()
	rt.NetNS = "" // removed with the pod
	err := a.cniIn(a.deferred.cache.dir, a.delTimeout, a.otherSlots, nil).DelNetworkList(ctx, e.list, rt)
	if err != nil {
		a.log.Warn("DEL of a reinstalled CNI plugin failed; retrying",
			"retry", deferredRetryInterval, "sandbox", e.ContainerID, "network", e.Network, "err", boundError(err))
		a.deferred.cache.restoreEntry(name, e)
		return
	}

	a.log.Info("a reinstalled CNI plugin has released its resources of a removed pod",
		"sandbox", e.ContainerID, "network", e.Network)
	a.deferred.forget(name)
}

// installed returns the installed part of the entry's configuration, empty if it has none.
func (e *entry) installed(binDirs []string) installedPart {
	if e.list == nil {
		return installedPart{}
	}
	return splitInstalled(e.list, binDirs)
}

// entryOf encodes an attachment in the format of libcni's cache.
func entryOf(c attachment) ([]byte, error) {
	return json.Marshal(&entry{
		Kind:         libcni.CNICacheV1,
		ContainerID:  c.rt.ContainerID,
		Config:       c.list.Bytes,
		IfName:       c.rt.IfName,
		Network:      c.list.Name,
		NetNS:        c.netns,
		Args:         c.rt.Args,
		Capabilities: c.rt.CapabilityArgs,
		Result:       c.result,
	})
}
