package podnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
)

// attachment describes a connection of a pod.
type attachment struct {
	list *libcni.NetworkConfigList
	rt   *libcni.RuntimeConf
	// netns is the path passed to the plugins of the ADD, "" if unknown.
	netns   string
	result  json.RawMessage // result of the ADD, nil if unknown
	guessed bool            // no record of a connection exists
}

// MissingPluginError reports a network with a missing IPAM program. The pod may be removed, but its
// network namespace must stay for a later Del.
type MissingPluginError struct {
	Program string // name of the missing program
	Err     error
}

func (e *MissingPluginError) Error() string { return e.Err.Error() }

func (e *MissingPluginError) Unwrap() error { return e.Err }

// del disconnects a pod with the configurations used to connect it. Without a record, a pod with a
// namespace may be the leftover of an older shim's interrupted ADD. del disconnects it with the
// current configuration, if there is one. It does the same for a connection of an older shim, and
// then requires a configuration.
func (a *attacher) del(ctx context.Context, current *libcni.NetworkConfigList, p Pod) error {
	attachments, err := a.findAttachments(ctx, p)
	if err != nil {
		return fmt.Errorf("disconnect pod %s: %w", p.title(), err)
	}

	connected := p.Foreign || a.cache.isDamaged(p.ID) // resources exist although the configuration is unknown
	if len(attachments) == 0 && connected && current == nil {
		return fmt.Errorf("disconnect pod %s: it is missing from the CNI cache, and there is no CNI configuration: %w",
			p.title(), errdefs.ErrUnavailable)
	}

	if len(attachments) == 0 && (p.NetNS != "" || connected) && current != nil {
		attachments = append(attachments, attachment{
			list:    current,
			rt:      releaseConf(p),
			guessed: !connected,
		})
	}

	var errs []error
	for _, c := range attachments {
		if err := a.delete(ctx, c, p.title()); err != nil {
			errs = append(errs, fmt.Errorf("disconnect pod %s from network %s: %w", p.title(), c.list.Name, err))
		}
	}

	if err := errors.Join(errs...); err != nil {
		return boundError(err)
	}

	return a.forget(p.ID)
}

// delete runs the DEL of the installed plugins with the result of the ADD. It defers the DEL of
// uninstalled plugins. The journal records the DEL, if possible, until all attachments of the pod
// are removed.
func (a *attacher) delete(ctx context.Context, c attachment, pod string) error {
	rest := splitInstalled(c.list, a.binDirs)
	held, err := a.journal.begin(c.list, c.rt, unconfirmed)
	if err != nil {
		a.log.Warn("cannot record a DEL in the journal", "err", err)
	} else {
		defer held.Close()
	}

	if err := a.cniIn(a.cacheDir, a.delTimeout, a.otherSlots, held).DelNetworkList(ctx, rest.list, c.rt); err != nil {
		return err
	}

	if c.guessed {
		return nil // missing plugins have no known resources
	}

	if rest.address != "" {
		err := rest.addressErr // of the split, since the program may be reinstalled meanwhile
		if c.result != nil {   // libcni removed the entry with the DEL of the others
			err = errors.Join(err, a.cache.restore(c))
		}
		return &MissingPluginError{
			Program: rest.address,
			Err:     fmt.Errorf("plugin %q cannot release the pod's address: %w", rest.holder, err),
		}
	}

	if len(rest.missing) > 0 {
		return a.deferDel(c, rest.missing, pod)
	}

	return nil
}

// deferDel records the resources of uninstalled plugins for a later DEL, and logs this. The pod may
// be removed.
func (a *attacher) deferDel(c attachment, missing []string, pod string) error {
	if err := a.deferred.add(c); err != nil {
		return err
	}

	a.log.Warn("CNI plugins were uninstalled while a pod was running; reinstall them to release their resources",
		"plugins", strings.Join(missing, ", "), "pod", pod, "sandbox", c.rt.ContainerID, "network", c.list.Name,
		"timeout", deferredMaxAge)

	return nil
}

// installedPart is a configuration without its uninstalled programs.
type installedPart struct {
	list    *libcni.NetworkConfigList // with the installed plugins
	missing []string                  // uninstalled plugins of the chain

	// address is an uninstalled IPAM program, or "", and holder the plugin calling it. The list
	// omits the holder: standard plugins delete their interface before they call the IPAM program.
	// The addresses of the interface identify the masquerading rules, so a second DEL after a
	// failed IPAM call would not find these rules.
	address, holder string
	addressErr      error // the reason why address is missing
}

func splitInstalled(list *libcni.NetworkConfigList, binDirs []string) installedPart {
	rest := *list
	rest.Plugins = nil
	p := installedPart{list: &rest}
	for _, plugin := range list.Plugins {
		name, address := plugin.Network.Type, ipamPlugin(plugin)
		if _, err := Find(name, binDirs); err != nil {
			p.missing = append(p.missing, name)
			continue
		}

		if address != "" {
			if _, err := Find(address, binDirs); err != nil {
				p.holder, p.address, p.addressErr = name, address, fmt.Errorf("network %s: %w", list.Name, err)
				continue
			}
		}

		rest.Plugins = append(rest.Plugins, plugin)
	}

	return p
}

// findAttachments returns the attachments of a pod in libcni's cache, or of an unfinished ADD in
// the journal. It first waits until the plugins of that ADD have exited.
func (a *attacher) findAttachments(ctx context.Context, p Pod) ([]attachment, error) {
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
		rt.CapabilityArgs = withPorts(rt.CapabilityArgs, p.Ports)
		if p.NetNS == "" || !isNetNS(p.NetNS)(e.NetNS) { // otherwise keep the path of the plugins' result
			rt.NetNS = p.NetNS
		}

		out = append(out, attachment{
			list:   e.list,
			rt:     rt,
			netns:  e.NetNS,
			result: e.Result,
		})
		if pending != nil && e.IfName == pending.IfName {
			pending = nil
		}
	}

	if pending != nil {
		out = append(out, attachment{
			list: pending.list,
			rt:   pending.runtime(p.NetNS),
		})
	}

	return out, nil
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

// delegators are the standard plugins with an IPAM plugin, named in their section "ipam" (CNI
// specification, section 4). Other plugins may use this section differently: azure-vnet implements
// "azure-cns" itself.
var delegators = []string{"bridge", "dummy", "host-device", "ipvlan", "macvlan", "ptp", "tap", "vlan"}

// ipamPlugin returns the name of the IPAM program required by a plugin, "" for none.
func ipamPlugin(p *libcni.PluginConfig) string {
	if !slices.Contains(delegators, p.Network.Type) {
		return ""
	}
	return p.Network.IPAM.Type
}
