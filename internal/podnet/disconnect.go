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

// attachment is how a pod was connected.
type attachment struct {
	list *libcni.NetworkConfigList
	rt   *libcni.RuntimeConf
	// the path that the plugins of the ADD were given, "" if it is not known
	netns   string
	result  json.RawMessage // what the ADD gave, nil if it is not known
	guessed bool            // nothing says that the pod was ever connected
}

// OwedError is a network that cannot be released before a program is installed again. The pod need
// not wait for it, but its network namespace must stay: Del needs it.
type OwedError struct {
	Program string // the one that is missing
	Err     error
}

func (e *OwedError) Error() string { return e.Err.Error() }

func (e *OwedError) Unwrap() error { return e.Err }

// del disconnects a pod with the configurations with which it was connected. A pod of which neither
// cache nor journal knows, but whose namespace is still there, may have been left by an older shim
// in the middle of an ADD: it is disconnected with the current configuration, if there is one. So
// is one that an older shim has connected, which needs a configuration.
func (a *attacher) del(ctx context.Context, current *libcni.NetworkConfigList, p Pod) error {
	attachments, err := a.attachments(ctx, p)
	if err != nil {
		return fmt.Errorf("disconnect pod %s: %w", p.title(), err)
	}

	connected := p.Foreign || a.cache.isDamaged(p.ID) // something is to be released although nobody knows how
	if len(attachments) == 0 && connected && current == nil {
		return fmt.Errorf("disconnect pod %s: the CNI cache does not know it, and there is no configuration to do "+
			"it with: %w",
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

// delete runs the DEL of the plugins that are installed, with the result of the ADD. What plugins
// that were uninstalled meanwhile hold is owed. The DEL is noted until all of the pod's attachments
// are gone, if there is room for a note.
func (a *attacher) delete(ctx context.Context, c attachment, pod string) error {
	rest := split(c.list, a.binDirs)
	held, err := a.journal.begin(c.list, c.rt, unconfirmed)
	if err != nil {
		a.log.Warn("a DEL begins without a note of it", "err", err)
	} else {
		defer held.Close()
	}

	if err := a.cniIn(a.cacheDir, a.delLimit, a.others, held).DelNetworkList(ctx, rest.list, c.rt); err != nil {
		return err
	}

	if c.guessed {
		return nil // plugins that are missing hold nothing that anybody knows of
	}

	if rest.address != "" {
		err := missing(c.list, a.binDirs)
		if c.result != nil { // libcni has forgotten it with the DEL of the others
			err = errors.Join(err, a.cache.restore(c))
		}
		return &OwedError{rest.address, fmt.Errorf("plugin %q cannot release the pod's address: %w", rest.holder, err)}
	}

	if len(rest.missing) > 0 {
		return a.owe(c, rest.missing, pod)
	}

	return nil
}

// owe notes what plugins hold that are not installed any more, and reports it. The pod is free of
// it.
func (a *attacher) owe(c attachment, missing []string, pod string) error {
	if err := a.owed.add(c); err != nil {
		return err
	}
	a.log.Warn("CNI plugins were uninstalled while a pod ran; what they hold of it is released if they come back",
		"plugins", strings.Join(missing, ", "), "pod", pod, "sandbox", c.rt.ContainerID, "network", c.list.Name,
		"within", owedFor)
	return nil
}

// part is what is left of a configuration from which programs were uninstalled.
type part struct {
	list    *libcni.NetworkConfigList // with the plugins that can run
	missing []string                  // plugins of the chain that are not installed

	// address is a program for addresses that is not installed, "" for none, and holder the plugin
	// that delegates to it. The holder is not in list: the standard plugins remove their interface,
	// which knows the addresses of masquerading rules, before they call that program, and the DEL
	// after one that failed there would not find them.
	address, holder string
}

func split(list *libcni.NetworkConfigList, binDirs []string) part {
	rest := *list
	rest.Plugins = nil
	p := part{list: &rest}
	for _, plugin := range list.Plugins {
		name, address := plugin.Network.Type, delegate(plugin)
		if _, err := Find(name, binDirs); err != nil {
			p.missing = append(p.missing, name)
			continue
		}

		if address != "" {
			if _, err := Find(address, binDirs); err != nil {
				p.holder, p.address = name, address
				continue
			}
		}

		rest.Plugins = append(rest.Plugins, plugin)
	}

	return p
}

// attachments are those of a pod in libcni's cache or, if an ADD did not get so far, in the
// journal; then nothing of it runs any more.
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
		rt.CapabilityArgs = withPorts(rt.CapabilityArgs, p.Ports)
		if p.NetNS == "" || !isNetNS(p.NetNS)(e.NetNS) { // else the path that is in the plugins' result
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

// delegators are the standard plugins that run the program which their section "ipam" names (CNI
// specification, section 4). What other plugins do with that section is their own affair:
// azure-vnet implements "azure-cns" itself.
var delegators = []string{"bridge", "dummy", "host-device", "ipvlan", "macvlan", "ptp", "tap", "vlan"}

// delegate is the program for addresses that a plugin needs, "" for none.
func delegate(p *libcni.PluginConfig) string {
	if !slices.Contains(delegators, p.Network.Type) {
		return ""
	}
	return p.Network.IPAM.Type
}
