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
	// for one plugin's DEL; Cilium's takes 42 s while its agent is away
	delDeadline    = 3 * time.Minute
	statusDeadline = 5 * time.Second // for one plugin's STATUS
)

// attacher runs the plugins of a configuration for pods, and remembers what they gave. libcni's
// cache is where that is kept, and the journal what is being made; memory is a copy of both.
type attacher struct {
	binDirs  []string
	cacheDir string
	observer *Observer
	log      *slog.Logger
	limit    time.Duration // for one command of one plugin, but DEL
	delLimit time.Duration // for one plugin's DEL
	adding   chan struct{} // slots of plugins that run at once for ADD
	others   chan struct{} // and for everything else: a network whose ADD hangs can be released
	cache    *cache
	journal  journal
	owed     *owed

	// an ADD takes one, GC all: it would take what an ADD beside it is making for a leftover
	running *semaphore.Weighted

	mu sync.RWMutex // guards the rest
	// by sandbox ID; an entry for every pod that holds, or may hold, a connection
	ips map[string][]netip.Addr
	// by sandbox ID: what add gave to pods that are not complete
	unconfirmed map[string][]netip.Addr
}

// newAttacher reads what earlier processes attached, or were attaching. Pins may be nil.
func newAttacher(
	binDirs []string, cacheDir string, pins *Pins, observer *Observer, log *slog.Logger,
) (*attacher, error) {
	a := &attacher{
		binDirs:     binDirs,
		cacheDir:    cacheDir,
		observer:    observer,
		log:         log,
		limit:       pluginDeadline,
		delLimit:    delDeadline,
		running:     semaphore.NewWeighted(maxRunning),
		adding:      make(chan struct{}, pluginsAtOnce),
		others:      make(chan struct{}, pluginsAtOnce),
		cache:       newCache(cacheDir, log),
		owed:        newOwed(cacheDir),
		ips:         map[string][]netip.Addr{},
		unconfirmed: map[string][]netip.Addr{},
	}

	a.journal = journal{filepath.Join(cacheDir, "pending"), a.cache}
	for _, dir := range []string{"results", "pending"} {
		if err := a.cache.clearWay(dir); err != nil {
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
		if e.result == nil { // it is set aside: only the journal keeps its configuration
			a.keep(e)
		}
	}

	for _, id := range a.journal.list() {
		a.ips[id] = nil // also if the plugins were done: the pod was not
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

// isConfirmed says whether a pod whose entry in the cache is lost was complete.
func (a *attacher) isConfirmed(id string) bool {
	r, err := a.journal.read(id)
	return err == nil && (r == nil || r.Confirmed)
}

// keep notes in the journal how a pod was connected, if it has no record.
func (a *attacher) keep(e *entry) {
	if r, err := a.journal.read(e.ContainerID); r != nil || err != nil {
		return
	}

	held, err := a.journal.begin(e.list, e.runtime(), confirmed)
	if err != nil {
		a.log.Warn("the configuration of a pod's network is lost; the current one releases it", "sandbox",
			e.ContainerID, "err", err)
		return
	}

	held.Close()
}

// cni is libcni with plugins that take these slots and hold a file open, if one is given.
func (a *attacher) cni(slots chan struct{}, held *os.File) *libcni.CNIConfig {
	return a.cniIn(a.cacheDir, a.limit, slots, held)
}

// cniIn is libcni with its cache in cacheDir. limit bounds each command of each plugin.
func (a *attacher) cniIn(cacheDir string, limit time.Duration, slots chan struct{}, held *os.File) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(a.binDirs, cacheDir, &plugins{
		observer: a.observer,
		log:      a.log,
		limit:    limit,
		slots:    slots,
		held:     held,
	})
}

// add connects a pod with a configuration. After an error the caller releases the pod with del,
// which knows how far the plugins came. No plugin runs if one of the chain is missing.
func (a *attacher) add(
	ctx context.Context, list *libcni.NetworkConfigList, p Pod, ranges []netip.Prefix,
) ([]netip.Addr, error) {
	if err := a.running.Acquire(ctx, 1); err != nil {
		return nil, fmt.Errorf("connect pod %s to network %s: wait for GC: %w", p.title(), list.Name, err)
	}
	defer a.running.Release(1)

	ips, err := a.addLocked(ctx, list, p, ranges)
	if err != nil {
		return nil, boundError(fmt.Errorf("connect pod %s to network %s: %w", p.title(), list.Name, err))
	}

	return ips, nil
}

func (a *attacher) addLocked(
	ctx context.Context, list *libcni.NetworkConfigList, p Pod, ranges []netip.Prefix,
) ([]netip.Addr, error) {
	if err := missing(list, a.binDirs); err != nil {
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

	result, err := a.cni(a.adding, held).AddNetworkList(ctx, list, rt)
	held.Close()
	if err != nil { // its plugins may have been killed
		if err := a.releaseTorn(context.WithoutCancel(ctx), list); err != nil {
			a.log.Debug("reservations without an owner are not released yet", "err", err)
		}
	}

	var ips []netip.Addr
	if err == nil {
		ips, err = podAddresses(result, p.NetNS)
	}

	a.mu.Lock()
	defer a.mu.Unlock()

	a.unconfirmed[p.ID] = ips // also after an error: the plugins have ended

	return ips, err
}

// confirm makes what add gave known.
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

// hasEnded says whether this process has seen all plugins of a pod's ADD end. What they have left
// running may hold the record open for as long as the pod lives.
func (a *attacher) hasEnded(id string) bool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	_, ok := a.unconfirmed[id]
	return ok
}

// check asks the plugins whether a pod's connection is still as they made it (CNI specification,
// CHECK).
func (a *attacher) check(ctx context.Context, p Pod) error {
	attachments, err := a.attachments(ctx, p)
	if err != nil {
		return err
	}

	for _, c := range attachments {
		err := a.cni(a.others, nil).CheckNetworkList(ctx, c.list, c.rt)
		if err != nil && !errors.Is(err, libcni.ErrorCheckNotSupp) {
			return boundError(fmt.Errorf("network %s of pod %s: %w", c.list.Name, p.title(), err))
		}
	}

	return nil
}

// collect has the plugins of a configuration release what belongs to none of the connections that
// we know (CNI specification, GC). Configurations older than GC, and those with disableGC, are left
// alone, but for reservations without an owner.
func (a *attacher) collect(ctx context.Context, list *libcni.NetworkConfigList) error {
	torn := a.releaseTorn(ctx, list)
	if !hasGC(list) {
		return torn
	}
	return errors.Join(torn, a.collectUnowned(ctx, list))
}

// collectUnowned is GC of a configuration that has it.
func (a *attacher) collectUnowned(ctx context.Context, list *libcni.NetworkConfigList) error {
	if err := a.awaitNoAdd(ctx); err != nil {
		return err
	}
	defer a.running.Release(maxRunning)

	cached, err := a.cache.entries("")
	if err != nil {
		return err
	}

	valid := []types.GCAttachment{} // never nil: plugins are to read a list
	for _, id := range a.attached() {
		valid = append(valid, types.GCAttachment{ContainerID: id, IfName: ifName})
	}

	for _, c := range cached { // also those of other interfaces, which are not ours
		if g := (types.GCAttachment{ContainerID: c.ContainerID, IfName: c.IfName}); !slices.Contains(valid, g) {
			valid = append(valid, g)
		}
	}

	return boundError(a.cni(a.others, nil).GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: valid}))
}

const (
	maxRunning    = 1 << 30     // ADDs at once
	noAddDeadline = time.Minute // for GC to meet a moment without an ADD
	noAddInterval = 20 * time.Millisecond
)

// awaitNoAdd takes the whole of running as soon as no ADD runs. It does not queue: an ADD that
// hangs would hold up GC, and GC all other ADDs.
func (a *attacher) awaitNoAdd(ctx context.Context) error {
	tick := time.NewTicker(noAddInterval)
	defer tick.Stop()

	for deadline := time.Now().Add(noAddDeadline); !a.running.TryAcquire(maxRunning); {
		if time.Now().After(deadline) {
			return fmt.Errorf("GC: pods are being connected all the time: %w", errdefs.ErrUnavailable)
		}

		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}

	return nil
}

// hasGC says whether a configuration is of the CNI version that brought GC and STATUS, or newer.
func hasGC(list *libcni.NetworkConfigList) bool {
	can, err := version.GreaterThanOrEqualTo(list.CNIVersion, "1.1.0")
	return err == nil && can
}

// status asks the plugins of a configuration whether they can take an ADD (CNI specification,
// STATUS). Older configurations always can.
func (a *attacher) status(ctx context.Context, list *libcni.NetworkConfigList) error {
	cni := a.cniIn(a.cacheDir, statusDeadline, a.others, nil)
	if err := cni.GetStatusNetworkList(ctx, list); err != nil {
		return boundError(fmt.Errorf("network %s is not ready: %w", list.Name, err))
	}
	return nil
}

// addressesOf are a pod's addresses.
func (a *attacher) addressesOf(id string) []netip.Addr {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.ips[id]
}

// attached are the sandboxes that hold a connection.
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
