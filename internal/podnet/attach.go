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

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/undo"
)

const (
	ifName         = "eth0"
	undoDeadline   = 30 * time.Second
	statusDeadline = 5 * time.Second // for one plugin's STATUS
)

// attacher runs the plugins of a configuration for pods, and remembers what they gave. libcni's cache is where that is kept, and the
// journal what is being made; memory is a copy of both.
type attacher struct {
	binDirs  []string
	cacheDir string
	observer *Observer
	log      *slog.Logger
	limit    time.Duration // for one command of one plugin
	adding   chan struct{} // slots of plugins that run at once for ADD
	others   chan struct{} // and for everything else: a network whose ADD hangs can be released
	cache    *cache
	journal  journal

	collecting sync.RWMutex // held by GC alone: it would take what an ADD beside it is making for a leftover

	mu          sync.RWMutex            // guards the rest
	ips         map[string][]netip.Addr // by sandbox ID; an entry for every pod that holds, or may hold, a connection
	unconfirmed map[string][]netip.Addr // by sandbox ID: what add gave to pods that are not complete
}

// newAttacher reads what earlier processes attached, or were attaching. Pins may be nil.
func newAttacher(binDirs []string, cacheDir string, pins *Pins, observer *Observer, log *slog.Logger) (*attacher, error) {
	a := &attacher{
		binDirs:     binDirs,
		cacheDir:    cacheDir,
		observer:    observer,
		log:         log,
		limit:       pluginDeadline,
		adding:      make(chan struct{}, pluginsAtOnce),
		others:      make(chan struct{}, pluginsAtOnce),
		cache:       newCache(cacheDir, log),
		ips:         map[string][]netip.Addr{},
		unconfirmed: map[string][]netip.Addr{},
	}
	a.journal = journal{filepath.Join(cacheDir, "pending"), a.cache}

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
		a.log.Warn("the configuration of a pod's network is lost; the current one releases it", "sandbox", e.ContainerID, "err", err)
		return
	}
	held.Close()
}

// cni is libcni with plugins that take these slots and hold a file open, if one is given.
func (a *attacher) cni(slots chan struct{}, held *os.File) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(a.binDirs, a.cacheDir, &plugins{observer: a.observer, log: a.log, limit: a.limit, slots: slots, held: held})
}

// add connects a pod with a configuration. On error nothing is left, or a later del knows of it.
func (a *attacher) add(ctx context.Context, list *libcni.NetworkConfigList, p Pod, ranges []netip.Prefix) (_ []netip.Addr, err error) {
	a.collecting.RLock()
	defer a.collecting.RUnlock()
	if err := loopbackUp(p.NetNS); err != nil {
		return nil, fmt.Errorf("bring up lo of pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	rt, err := runtimeConf(p, ranges)
	if err != nil {
		return nil, err
	}

	var u undo.Stack
	defer func() {
		if err != nil {
			err = fmt.Errorf("connect pod %s/%s to network %s: %w", p.Namespace, p.Name, list.Name, err)
			err = boundError(errors.Join(err, u.Run(ctx, undoDeadline)))
		}
	}()

	held, err := a.journal.begin(list, rt, unconfirmed)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	a.ips[p.ID] = nil
	a.mu.Unlock()
	u.Push("CNI ADD", func(ctx context.Context) error {
		if err := a.delete(ctx, attachment{list, rt}); err != nil {
			return err
		}
		return a.forget(p.ID)
	})
	result, err := a.cni(a.adding, held).AddNetworkList(ctx, list, rt)
	held.Close()
	if err != nil {
		return nil, err
	}
	ips, err := podAddresses(result, p.NetNS)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.unconfirmed[p.ID] = ips
	return ips, nil
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

// del disconnects a pod with the configurations with which it was connected. A pod of which neither cache nor journal knows, but whose
// namespace is still there, may have been left by an older shim in the middle of an ADD: it is disconnected with the current configuration,
// if there is one. So is one that an older shim has connected, which needs a configuration.
func (a *attacher) del(ctx context.Context, current *libcni.NetworkConfigList, p Pod) error {
	attachments, err := a.attachments(ctx, p)
	if err != nil {
		return fmt.Errorf("disconnect pod %s: %w", p.title(), err)
	}
	owed := p.Foreign || a.cache.isDamaged(p.ID) // something is to be released although nobody knows how
	if len(attachments) == 0 && owed && current == nil {
		return fmt.Errorf("disconnect pod %s: the CNI cache does not know it, and there is no configuration to do it with: %w", p.title(), errdefs.ErrUnavailable)
	}
	if len(attachments) == 0 && (p.NetNS != "" || owed) && current != nil {
		attachments = append(attachments, attachment{current, releaseConf(p)})
	}

	var errs []error
	for _, c := range attachments {
		if err := a.delete(ctx, c); err != nil {
			errs = append(errs, fmt.Errorf("disconnect pod %s from network %s: %w", p.title(), c.list.Name, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return boundError(err)
	}
	return a.forget(p.ID)
}

// delete runs the plugins' DEL for one attachment. It is noted until all of the pod's are gone, if there is room for a note.
func (a *attacher) delete(ctx context.Context, c attachment) error {
	// The bridge plugin removes its link, which knows the pod's addresses, before it calls the one for addresses: what a DEL that failed there has
	// not removed, the next one does not find.
	if err := missing(c.list, a.binDirs); err != nil {
		return err
	}
	held, err := a.journal.begin(c.list, c.rt, unconfirmed)
	if err != nil {
		a.log.Warn("a DEL begins without a note of it", "err", err)
	} else {
		defer held.Close()
	}
	return a.cni(a.others, held).DelNetworkList(ctx, c.list, c.rt)
}

// attachment is how a pod was connected.
type attachment struct {
	list *libcni.NetworkConfigList
	rt   *libcni.RuntimeConf
}

// attachments are those of a pod in libcni's cache or, if an ADD did not get so far, in the journal; then nothing of it runs any more.
func (a *attacher) attachments(ctx context.Context, p Pod) ([]attachment, error) {
	pending, err := a.journal.read(p.ID)
	if err != nil {
		return nil, err
	}
	if pending != nil && !a.hasEnded(p.ID) {
		if err := a.journal.await(ctx, p.ID); err != nil {
			return nil, err
		}
	}
	cached, err := a.cache.entries(p.ID)
	if err != nil {
		return nil, err
	}

	var out []attachment
	for _, e := range cached {
		rt := e.runtime()
		rt.NetNS, rt.CapabilityArgs = p.NetNS, withPorts(rt.CapabilityArgs, p.Ports)
		out = append(out, attachment{e.list, rt})
		if pending != nil && e.IfName == pending.IfName {
			pending = nil
		}
	}
	if pending != nil {
		out = append(out, attachment{pending.list, pending.runtime(p.NetNS)})
	}
	return out, nil
}

// hasEnded says whether this process has seen all plugins of a pod's ADD end. What they have left running
// may hold the record open for as long as the pod lives.
func (a *attacher) hasEnded(id string) bool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	_, ok := a.unconfirmed[id]
	return ok
}

// check asks the plugins whether a pod's connection is still as they made it (CNI specification, CHECK).
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

// collect has the plugins of a configuration release what belongs to none of the connections that we know (CNI specification, GC).
// Configurations older than GC, and those with disableGC, are left alone.
func (a *attacher) collect(ctx context.Context, list *libcni.NetworkConfigList) error {
	if !hasGC(list) {
		return nil
	}
	a.collecting.Lock()
	defer a.collecting.Unlock()
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

// hasGC says whether a configuration is of the CNI version that brought GC and STATUS, or newer.
func hasGC(list *libcni.NetworkConfigList) bool {
	can, err := version.GreaterThanOrEqualTo(list.CNIVersion, "1.1.0")
	return err == nil && can
}

// status asks the plugins of a configuration whether they can take an ADD (CNI specification, STATUS). Older configurations always can.
func (a *attacher) status(ctx context.Context, list *libcni.NetworkConfigList) error {
	cni := libcni.NewCNIConfigWithCacheDir(a.binDirs, a.cacheDir, &plugins{observer: a.observer, log: a.log, limit: statusDeadline, slots: a.others})
	if err := cni.GetStatusNetworkList(ctx, list); err != nil {
		return boundError(fmt.Errorf("network %s is not ready: %w", list.Name, err))
	}
	return nil
}

func (a *attacher) forget(id string) error {
	if err := a.journal.end(id); err != nil {
		return err
	}
	a.cache.forget(id)
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.ips, id)
	delete(a.unconfirmed, id)
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
