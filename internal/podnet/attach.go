package podnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sync/semaphore"

	"cri-dockerd/internal/model"
)

const (
	ifName = "eth0"
	// for one plugin's DEL; Cilium's takes 42 s while its agent is down
	defaultDelTimeout = 3 * time.Minute
	statusTimeout     = 5 * time.Second // for one plugin's STATUS
)

// attacher runs the plugins of a configuration for pods and records their results. libcni's cache
// stores completed connections, and the journal those in progress. The maps below are a copy of
// both.
type attacher struct {
	binDirs    []string
	cacheDir   string
	observer   *Observer
	log        *slog.Logger
	timeout    time.Duration // for one command of one plugin, except DEL
	delTimeout time.Duration // for one plugin's DEL
	addSlots   chan struct{} // slots for concurrent ADD plugins
	otherSlots chan struct{} // slots for other commands, so a hanging ADD does not block the release of a network
	cache      *cache
	journal    journal
	deferred   *deferred

	// An ADD acquires 1, GC all of it. Otherwise GC would release resources of a concurrent ADD.
	activeAdds *semaphore.Weighted

	mu sync.RWMutex // guards the fields below
	// by sandbox ID; an entry for every pod with an established or possible connection
	ips map[string][]netip.Addr
	// by sandbox ID: results of add for incomplete pods
	unconfirmed map[string][]netip.Addr
}

// newAttacher loads the connections of earlier processes, complete or not. Pins may be nil.
func newAttacher(
	binDirs []string, cacheDir string, pins *Pins, observer *Observer, log *slog.Logger,
) (*attacher, error) {
	a := &attacher{
		binDirs:     binDirs,
		cacheDir:    cacheDir,
		observer:    observer,
		log:         log,
		timeout:     pluginTimeout,
		delTimeout:  defaultDelTimeout,
		activeAdds:  semaphore.NewWeighted(maxActiveAdds),
		addSlots:    make(chan struct{}, maxConcurrentPlugins),
		otherSlots:  make(chan struct{}, maxConcurrentPlugins),
		cache:       newCache(cacheDir, log),
		deferred:    newDeferred(cacheDir),
		ips:         map[string][]netip.Addr{},
		unconfirmed: map[string][]netip.Addr{},
	}

	a.journal = journal{filepath.Join(cacheDir, "pending"), a.cache}
	for _, dir := range []string{"results", "pending"} {
		if err := a.cache.setAsideNonDirectory(dir); err != nil {
			return nil, err
		}
	}

	cached, err := a.cache.entries("")
	if err != nil {
		return nil, err
	}

	for _, e := range cached {
		if _, err := model.ParseContainerID(e.ContainerID); err != nil || e.IfName != ifName {
			continue // of another runtime
		}
		a.ips[e.ContainerID] = e.addresses()
		if e.result == nil { // the entry is set aside, so only the journal keeps its configuration
			a.recordConfig(e)
		}
	}

	for _, id := range a.journal.list() {
		a.ips[id] = nil // also if the plugins finished, since the pod is incomplete
	}

	for id, connected := range a.cache.damagedPods() {
		if len(a.ips[string(id)]) > 0 {
			continue
		}
		a.ips[string(id)] = nil
		if connected && pins != nil && a.isConfirmed(string(id)) {
			a.ips[string(id)] = pins.addresses(id)
		}
	}

	return a, nil
}

// isConfirmed reports whether a pod with a lost cache entry was complete.
func (a *attacher) isConfirmed(id string) bool {
	r, err := a.journal.read(id)
	return err == nil && (r == nil || r.Confirmed)
}

// recordConfig records a pod's configuration in the journal, unless it has a record.
func (a *attacher) recordConfig(e *entry) {
	if r, err := a.journal.read(e.ContainerID); r != nil || err != nil {
		return
	}

	held, err := a.journal.begin(e.list, e.runtime(), confirmed)
	if err != nil {
		a.log.Warn("network configuration of a pod is lost; it will be released with the current one",
			"sandbox", e.ContainerID, "err", err)
		return
	}

	held.Close()
}

// cni returns a libcni client. Its plugins take these slots and keep held open, if not nil.
func (a *attacher) cni(slots chan struct{}, held *os.File) *libcni.CNIConfig {
	return a.cniIn(a.cacheDir, a.timeout, slots, held)
}

// cniIn returns a libcni client with its cache in cacheDir. Each command of a plugin is limited to
// timeout.
func (a *attacher) cniIn(cacheDir string, timeout time.Duration, slots chan struct{}, held *os.File) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(a.binDirs, cacheDir, &plugins{
		observer: a.observer,
		log:      a.log,
		timeout:  timeout,
		slots:    slots,
		held:     held,
	})
}

// add connects a pod with a configuration. After an error the caller releases the pod with del,
// which undoes the completed steps. No plugin runs if one of the chain is missing.
func (a *attacher) add(
	ctx context.Context, list *libcni.NetworkConfigList, p Pod, ranges []netip.Prefix,
) ([]netip.Addr, error) {
	if err := a.activeAdds.Acquire(ctx, 1); err != nil {
		return nil, fmt.Errorf("connect pod %s to network %s: wait for GC: %w", p.title(), list.Name, err)
	}
	defer a.activeAdds.Release(1)

	ips, err := a.addLocked(ctx, list, p, ranges)
	if err != nil {
		return nil, boundError(fmt.Errorf("connect pod %s to network %s: %w", p.title(), list.Name, err))
	}

	return ips, nil
}

func (a *attacher) addLocked(
	ctx context.Context, list *libcni.NetworkConfigList, p Pod, ranges []netip.Prefix,
) ([]netip.Addr, error) {
	if err := checkInstalled(list, a.binDirs); err != nil {
		return nil, err
	}

	rt, err := runtimeConf(list, p, ranges)
	if err != nil {
		return nil, err
	}

	if err := loopbackUp(p.NetNS); err != nil {
		return nil, fmt.Errorf("bring up lo: %w", err)
	}

	held, err := a.journal.begin(list, rt, unconfirmed)
	if err != nil {
		return nil, err
	}

	a.mu.Lock()
	a.ips[p.ID] = nil
	a.mu.Unlock()

	result, err := a.cni(a.addSlots, held).AddNetworkList(ctx, list, rt)
	held.Close()
	if err != nil { // its plugins may have been killed
		if err := a.releaseTorn(context.WithoutCancel(ctx), list); err != nil {
			a.log.Debug("cannot release reservations without an owner yet", "err", err)
		}
	}

	var ips []netip.Addr
	if err == nil {
		ips, err = podAddresses(result, p.NetNS)
	}

	a.mu.Lock()
	defer a.mu.Unlock()

	a.unconfirmed[p.ID] = ips // also after an error, since the plugins have exited

	return ips, err
}

// confirm publishes the addresses of add.
func (a *attacher) confirm(id string) error {
	if err := a.journal.end(id); err != nil {
		return err
	}

	a.mu.Lock()
	defer a.mu.Unlock()

	a.ips[id] = a.unconfirmed[id]
	delete(a.unconfirmed, id)

	return nil
}

// hasEnded reports whether this process has seen all plugins of a pod's ADD exit. Their background
// processes may keep the record open for the lifetime of the pod.
func (a *attacher) hasEnded(id string) bool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	_, ok := a.unconfirmed[id]
	return ok
}

// check verifies a pod's connection with the plugins (CNI specification, CHECK).
func (a *attacher) check(ctx context.Context, p Pod) error {
	attachments, err := a.findAttachments(ctx, p)
	if err != nil {
		return err
	}

	for _, c := range attachments {
		err := a.cni(a.otherSlots, nil).CheckNetworkList(ctx, c.list, c.rt)
		if err != nil && !errors.Is(err, libcni.ErrorCheckNotSupp) {
			return boundError(fmt.Errorf("network %s of pod %s: %w", c.list.Name, p.title(), err))
		}
	}

	return nil
}

// collect asks the plugins of a configuration to release resources of unknown connections (CNI
// specification, GC). For configurations older than GC or with disableGC it only releases
// reservations without an owner.
func (a *attacher) collect(ctx context.Context, list *libcni.NetworkConfigList) error {
	torn := a.releaseTorn(ctx, list)
	if !hasGC(list) {
		return torn
	}
	return errors.Join(torn, a.collectUnowned(ctx, list))
}

// collectUnowned runs GC for a configuration with GC.
func (a *attacher) collectUnowned(ctx context.Context, list *libcni.NetworkConfigList) error {
	if err := a.awaitNoAdd(ctx); err != nil {
		return err
	}
	defer a.activeAdds.Release(maxActiveAdds)

	cached, err := a.cache.entries("")
	if err != nil {
		return err
	}

	valid := []types.GCAttachment{} // never nil: plugins expect a list
	for _, id := range a.attached() {
		valid = append(valid, types.GCAttachment{ContainerID: id, IfName: ifName})
	}

	for _, c := range cached { // including foreign connections on other interfaces
		if g := (types.GCAttachment{ContainerID: c.ContainerID, IfName: c.IfName}); !slices.Contains(valid, g) {
			valid = append(valid, g)
		}
	}

	return boundError(a.cni(a.otherSlots, nil).GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: valid}))
}

const (
	maxActiveAdds = 1 << 30     // concurrent ADDs
	noAddTimeout  = time.Minute // how long GC waits for a moment without an ADD
	noAddInterval = 20 * time.Millisecond
)

// awaitNoAdd acquires all of activeAdds as soon as no ADD runs. It does not queue: otherwise a
// hanging ADD would block GC, and GC all other ADDs.
func (a *attacher) awaitNoAdd(ctx context.Context) error {
	tick := time.NewTicker(noAddInterval)
	defer tick.Stop()

	for deadline := time.Now().Add(noAddTimeout); !a.activeAdds.TryAcquire(maxActiveAdds); {
		if time.Now().After(deadline) {
			return fmt.Errorf("GC: no moment without a running ADD: %w", errdefs.ErrUnavailable)
		}

		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}

	return nil
}

// hasGC reports whether a configuration has GC and STATUS (CNI 1.1 or newer).
func hasGC(list *libcni.NetworkConfigList) bool {
	can, err := version.GreaterThanOrEqualTo(list.CNIVersion, "1.1.0")
	return err == nil && can
}

// status runs the plugins' STATUS (CNI specification). Older configurations are always ready.
func (a *attacher) status(ctx context.Context, list *libcni.NetworkConfigList) error {
	cni := a.cniIn(a.cacheDir, statusTimeout, a.otherSlots, nil)
	if err := cni.GetStatusNetworkList(ctx, list); err != nil {
		return boundError(fmt.Errorf("network %s is not ready: %w", list.Name, err))
	}
	return nil
}

// addressesOf returns a pod's addresses.
func (a *attacher) addressesOf(id string) []netip.Addr {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.ips[id]
}

// attached returns the sandboxes with a connection.
func (a *attacher) attached() []string {
	a.mu.RLock()
	defer a.mu.RUnlock()

	ids := make([]string, 0, len(a.ips))
	for id := range a.ips {
		ids = append(ids, id)
	}

	slices.Sort(ids)

	return ids
}
