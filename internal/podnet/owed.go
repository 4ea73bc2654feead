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
	// owedFor is how long a plugin that was uninstalled may take to come back, in an upgrade for
	// instance.
	owedFor = 24 * time.Hour
	// owedEvery is the interval in which plugins are looked for.
	owedEvery = 5 * time.Second
	// owedRetry is the pause after a DEL that failed.
	owedRetry = 10 * time.Minute
)

// owed keeps how pods were connected whose plugins were uninstalled while they ran: the pods are
// gone, and what these plugins hold is released when they are back. It is a cache of libcni's of
// its own.
type owed struct {
	cache *cache

	mu   sync.Mutex // guards next
	next map[string]time.Time
}

func newOwed(cacheDir string) *owed {
	return &owed{
		cache: newCache(filepath.Join(cacheDir, "owed"), nil),
		next:  map[string]time.Time{},
	}
}

// add notes an attachment.
func (o *owed) add(c attachment) error { return o.cache.restore(c) }

// isDue says whether a DEL may be tried now, and notes that it is.
func (o *owed) isDue(name string, now time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if now.Before(o.next[name]) {
		return false
	}
	o.next[name] = now.Add(owedRetry)
	return true
}

func (o *owed) forget(name string) {
	o.cache.remove(name)
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.next, name)
}

// run releases what is owed until ctx ends.
func (a *attacher) run(ctx context.Context) {
	tick := time.NewTicker(owedEvery)
	defer tick.Stop()

	for {
		a.payOwed(ctx, time.Now())
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// payOwed runs the DEL of each attachment that is owed and whose plugins are all installed, and
// forgets those that are too old.
func (a *attacher) payOwed(ctx context.Context, now time.Time) {
	entries, err := a.owed.cache.entries("")
	if err != nil {
		a.log.Debug("what is owed to uninstalled CNI plugins cannot be read", "err", err)
		return
	}

	for _, e := range entries {
		name := e.Network + "-" + e.ContainerID + "-" + e.IfName
		switch rest := e.split(a.binDirs); {
		case now.Sub(e.written) > owedFor:
			a.log.Warn("CNI plugins did not come back; what they hold of a pod stays",
				"plugins", rest.missing, "sandbox", e.ContainerID, "network", e.Network)
			a.owed.forget(name)
		case e.list == nil || len(rest.missing) > 0 || rest.address != "" || !a.owed.isDue(name, now):
		default:
			a.payOne(ctx, e, name)
		}
	}
}

// payOne runs one DEL. libcni drops an entry without a result before it runs the plugins.
func (a *attacher) payOne(ctx context.Context, e *entry, name string) {
	rt := e.runtime()
	rt.NetNS = "" // it went with the pod
	err := a.cniIn(a.owed.cache.dir, a.delLimit, a.others, nil).DelNetworkList(ctx, e.list, rt)
	if err != nil {
		a.log.Warn("a CNI plugin is back and does not release what it holds of a pod; trying again",
			"in", owedRetry, "sandbox", e.ContainerID, "network", e.Network, "err", boundError(err))
		a.owed.cache.keep(name, e)
		return
	}

	a.log.Info("a CNI plugin is back and has released what it held of a pod", "sandbox", e.ContainerID, "network",
		e.Network)
	a.owed.forget(name)
}

// split is what can run of the entry's configuration, nothing if it has none.
func (e *entry) split(binDirs []string) part {
	if e.list == nil {
		return part{}
	}
	return split(e.list, binDirs)
}

// entryOf is an attachment as libcni's cache keeps it.
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
