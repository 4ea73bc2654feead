package main

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// printDereferences removes each message of complete responses in turn and passes them to the
// kubelet's code. It prints a sorted line "message field" for each panic.
func printDereferences(ctx context.Context) error {
	if panicked, errs := readCanned(ctx, newCanned()); panicked != nil || len(errs) > 0 {
		return fmt.Errorf("complete responses: %v, %v", panicked, errs) // the results below would be meaningless
	}

	found := map[string]bool{}
	for i := range newCanned().all() {
		for _, p := range paths(newCanned().all()[i].ProtoReflect()) {
			c := newCanned()
			owner, field := p(c.all()[i].ProtoReflect())
			owner.Clear(field)
			if panicked, _ := readCanned(ctx, c); panicked != nil {
				found[fmt.Sprintf("%s %s", owner.Descriptor().FullName(), field.Name())] = true
			}
		}
	}

	for _, line := range slices.Sorted(maps.Keys(found)) {
		fmt.Println(line)
	}

	return nil
}

// readCanned passes canned responses to the kubelet's code. It returns the value of a panic.
func readCanned(ctx context.Context, c *canned) (panicked any, errs []error) {
	defer func() { panicked = recover() }()

	k, err := newKubelet(ctx, c, c)
	if err != nil {
		return nil, []error{err}
	}
	defer k.close()

	_, errs = k.read(ctx)
	k.event(c.event)

	return nil, errs
}

// path finds a nested message of a response: its owner and its field.
type path func(response protoreflect.Message) (owner protoreflect.Message, field protoreflect.FieldDescriptor)

// paths returns the paths to all nested messages of m, except list items, which cannot be missing.
func paths(m protoreflect.Message) (out []path) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if f.Kind() != protoreflect.MessageKind || f.IsMap() {
			return true
		}

		if !f.IsList() {
			out = append(out, func(m protoreflect.Message) (protoreflect.Message, protoreflect.FieldDescriptor) {
				return m, f
			})
			for _, p := range paths(v.Message()) {
				out = append(out, func(m protoreflect.Message) (protoreflect.Message, protoreflect.FieldDescriptor) {
					return p(m.Get(f).Message())
				})
			}

			return true
		}

		for i := range v.List().Len() {
			for _, p := range paths(v.List().Get(i).Message()) {
				out = append(out, func(m protoreflect.Message) (protoreflect.Message, protoreflect.FieldDescriptor) {
					return p(m.Get(f).List().Get(i).Message())
				})
			}
		}

		return true
	})

	return out
}

// fill sets all message fields of a message, including one item of each list of messages, so that
// each can be removed. It also sets empty strings and zero integers.
func fill[M proto.Message](m M) M {
	fillMessage(m.ProtoReflect(), 0)
	return m
}

// maxDepth exceeds the depth of all responses.
const maxDepth = 12

func fillMessage(m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case f.IsMap() || depth > maxDepth || f.ContainingOneof() != nil:
		case f.IsList() && f.Kind() == protoreflect.MessageKind:
			list := m.Mutable(f).List()
			if list.Len() == 0 {
				list.Append(list.NewElement())
			}
			for j := range list.Len() {
				fillMessage(list.Get(j).Message(), depth+1)
			}

		case f.IsList():
		case f.Kind() == protoreflect.MessageKind:
			fillMessage(m.Mutable(f).Message(), depth+1)
		case f.Kind() == protoreflect.StringKind && m.Get(f).String() == "":
			m.Set(f, protoreflect.ValueOfString("x"))
		case f.Kind() == protoreflect.Int64Kind && m.Get(f).Int() == 0:
			m.Set(f, protoreflect.ValueOfInt64(1))
		case f.Kind() == protoreflect.Uint64Kind && m.Get(f).Uint() == 0:
			m.Set(f, protoreflect.ValueOfUint64(1))
		}
	}
}

var (
	podMetadata       = &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "u"}
	containerMetadata = &runtimeapi.ContainerMetadata{Name: "main"}
	labels            = map[string]string{
		"io.kubernetes.pod.name": "web", "io.kubernetes.pod.namespace": "default", "io.kubernetes.pod.uid": "u",
		"io.kubernetes.container.name": "main",
	}
	imageSpec = &runtimeapi.ImageSpec{Image: "busybox"}
)
